"""Metrics, convergence, plots and reports; no nnU-Net needed."""
