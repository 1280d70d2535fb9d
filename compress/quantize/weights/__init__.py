"""What methods of quantization share: the scheme, which layers it applies to, rounding, and the report."""
