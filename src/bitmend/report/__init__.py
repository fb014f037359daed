"""Showing what was done."""
