"""Everything that touches nnU-Net: transfer, trainers, checkpoints."""
