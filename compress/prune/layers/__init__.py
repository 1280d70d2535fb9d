"""Changes to single layers of a denoiser: widths, ranks, their costs, and the order in which slices are removed."""
