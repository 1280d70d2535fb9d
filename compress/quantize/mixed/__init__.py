"""Bits for each layer: what each number of bits costs and loses there, and the best assignment."""
