"""From any folder of images and masks to an nnU-Net data set: find, check, show, write."""
