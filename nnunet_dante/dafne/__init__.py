"""The way to Dafne and back: `.model` files that its client and server run, teach and merge."""
