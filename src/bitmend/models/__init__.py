"""The only place that knows architectures."""
