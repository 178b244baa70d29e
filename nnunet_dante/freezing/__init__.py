"""Which parameters belong together, and from which epoch they are trained."""
