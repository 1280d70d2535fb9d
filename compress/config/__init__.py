"""From recipes and overrides to checked values."""
