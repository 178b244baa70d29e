"""From a donor model to the start of a training on other data."""
