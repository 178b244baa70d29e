"""Adapter files: what a training changed, in a few MB, apart from its base."""
