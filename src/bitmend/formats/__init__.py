"""Checkpoints: bitmend's own and those of other tools."""
