"""Which method suits a donor and a data set."""
