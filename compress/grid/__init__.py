"""Grids: a recipe run once for every combination of values."""
