"""Slow references in numpy float64, written from the papers' equations and from nothing else in this package.

They exist to disagree with the fast code when one of the two is wrong. Nothing here is blocked, factored or batched
over columns; a weight of a few dozen columns is what they are for.

Conventions, shared with the fast code: a weight is (out, in); tokens are rows; with the deviation
`d = x_fp - x_q` of a token between the full-precision and the quantised stream, the moments are `G = mean x_q x_q^T`,
`C = mean d x_q^T` and `D = mean d d^T`. `H` is `G` after damping.
"""

from bitmend.testing.reference.brute_force import (
    best_codes,
    best_codes_asymmetric,
    direct_objective,
    moments,
    moments_objective,
)
from bitmend.testing.reference.gptaq import (
    gptaq_fixed_order,
    rescomp_fixed_order,
    residual_rows,
    shifted_target,
    target_shift_fixed_order,
)
from bitmend.testing.reference.obq import levels_of, nearest_codes, obq_fixed_order

__all__ = [
    "best_codes",
    "best_codes_asymmetric",
    "direct_objective",
    "gptaq_fixed_order",
    "levels_of",
    "moments",
    "moments_objective",
    "nearest_codes",
    "obq_fixed_order",
    "rescomp_fixed_order",
    "residual_rows",
    "shifted_target",
    "target_shift_fixed_order",
]
