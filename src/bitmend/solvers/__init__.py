"""Parts that choose the codes of a weight matrix: one method, one file."""
