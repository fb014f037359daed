"""Parts that add parameters after rounding."""
