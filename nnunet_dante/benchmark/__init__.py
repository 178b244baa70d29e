"""Protocols: methods x shots x draws x donors, each run through nnU-Net's own training and prediction."""
