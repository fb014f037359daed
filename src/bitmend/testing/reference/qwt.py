"""QwT as its paper writes it, with every token in memory: a slow reference for `compensators/qwt.py`."""

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]


def linear_map(x: Matrix, e: Matrix) -> tuple[Matrix, Matrix]:
    """Return W (d, m) and b (m) with the least sum of ||e - x W - b||^2 (equation 6), by a QR factorisation of (x, 1)."""
    stacked = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    solution = np.linalg.lstsq(stacked, e, rcond=None)[0]
    return solution[:-1], solution[-1]


def r_squared(x: Matrix, e: Matrix, W: Matrix, b: Matrix) -> float:
    """Return 1 - sum ||e - x W - b||^2 / sum ||e - mean e||^2, which the paper gates on."""
    left = ((e - x @ W - b) ** 2).sum()
    return float(1 - left / ((e - e.mean(0)) ** 2).sum())


def scale_and_shift(y: Matrix, e: Matrix) -> tuple[Matrix, Matrix]:
    """Return a and b of each channel with the least sum of (e - a y - b)^2 (QwT-v2, by its abstract)."""
    pairs = [np.polyfit(y[:, channel], e[:, channel], 1) for channel in range(y.shape[1])]
    return np.array([slope for slope, _ in pairs]), np.array([offset for _, offset in pairs])
