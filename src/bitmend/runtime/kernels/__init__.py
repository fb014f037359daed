"""Kernels; `reference` is the slow one that others are compared with."""
