"""How a recipe of stages runs: its config, keys, checks and output."""
