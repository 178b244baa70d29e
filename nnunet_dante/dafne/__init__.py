"""Export to Dafne and import from it: `.model` files, which Dafne's client runs and trains and its server merges."""
