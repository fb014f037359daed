"""Codes <-> words."""
