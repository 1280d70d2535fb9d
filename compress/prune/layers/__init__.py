"""A width of its own for every part of a UNet: which widths there are, what they cost, and which go first."""
