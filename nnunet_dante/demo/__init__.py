"""The demo: a real fine-tuning on embedded public images, from end to end."""
