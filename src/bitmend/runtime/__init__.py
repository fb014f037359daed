"""Quantised modules and their kernels."""
