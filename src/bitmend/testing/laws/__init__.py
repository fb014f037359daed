"""What must hold for every part of a kind, written once and run over every registered one.

A plug-in runs them over its own part: each law is a plain function that raises AssertionError. `strategies` draws the
inputs with hypothesis, small and odd on purpose.
"""
