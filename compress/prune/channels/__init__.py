"""Which channels of a UNet belong together, and removing them."""
