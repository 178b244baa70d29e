"""Commands that look at the whole: the installation, and any file."""
