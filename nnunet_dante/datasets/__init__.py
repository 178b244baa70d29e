"""The data set of the user: images, masks, and which cases train."""
