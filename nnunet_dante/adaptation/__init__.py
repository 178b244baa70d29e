"""The whole way from labelled images and a pretrained network to an adapted one: `nnunet-dante adapt`."""
