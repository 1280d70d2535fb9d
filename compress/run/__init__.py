"""Runs a recipe of stages: config, keys, checks and output."""
