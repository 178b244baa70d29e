"""The pretrained model: its files, its network, its labels, and the settings that travel in its plans."""
