"""Low-rank adaptation of weights, for any torch network."""
