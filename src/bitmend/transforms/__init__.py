"""Parts that keep the function of a block and move the difficulty elsewhere."""
