"""Ranges of the inputs of layers, for integer arithmetic."""
