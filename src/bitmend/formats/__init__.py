"""Checkpoints: bitmend's own and those of other tools."""

from bitmend.formats.quantized_folder import QuantizedFolder, read_quantized

__all__ = ["QuantizedFolder", "read_quantized"]
