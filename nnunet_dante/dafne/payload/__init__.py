"""What ships inside a `.model` file as source; imports nothing of this package."""
