"""Groups of coupled channels of a UNet, and their removal."""
