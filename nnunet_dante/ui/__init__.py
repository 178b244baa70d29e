"""The page in the browser, `nnunet-dante ui`: what `adapt`, `compare` and `export` do, without typing."""
