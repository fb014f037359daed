"""Calibration data, stored activations and the two streams."""
