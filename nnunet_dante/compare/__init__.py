"""Comparing runs: results of a protocol, or fold folders of nnU-Net, become one report."""
