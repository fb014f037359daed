"""bitmend: compress trained networks to 4 bits and below, repair the damage, prove the repair."""
