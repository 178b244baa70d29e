"""Trainers for nnU-Net, and what a training needs from start to end."""
