"""Which numbers are allowed: granularities, grids, observers and quantised tensors."""
