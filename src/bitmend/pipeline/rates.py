"""How fast this machine is at what a run is made of, measured in about a second at shapes like those of the run.

Rates are of one process with the threads that torch has now. On a device that works in the background, the clock waits for
it.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bitmend.linalg.cholesky import factor_inverse
from bitmend.linalg.column_sweep import round_columns
from bitmend.numerics.observers import choose_qparams
from bitmend.numerics.products import linear
from bitmend.numerics.qtensor import QuantSpec, quantize
from bitmend.packing.bits import pack_codes

LARGEST_SIDE = 768  # of a matrix that a rate is measured on
SEARCHED_ENTRIES = 2**16
SWEPT_ROWS = (32, 256)
OUT_OF_CACHE = 2**23  # numbers, so many that a pass over them goes to memory and takes fresh pages


@dataclass(frozen=True)
class Rates:
    """What one second does.

    Attributes:
        product: operations of products in float32 (moments, measures of a strength).
        double_product: the same in float64 (the proof, residual terms).
        factor: operations of a factorisation and its triangular solve.
        pass_over: bytes of a pass over memory, read or written.
        search: entries whose scales are searched.
        rounding: entries that are rounded to nearest and decoded again.
        pack: codes that are packed into words.
        sweep_column: seconds of one column of a sweep, whatever its height.
        sweep_entry: seconds of one more entry in a column, products apart.
    """

    product: float
    double_product: float
    factor: float
    pass_over: float
    search: float
    rounding: float
    pack: float
    sweep_column: float
    sweep_entry: float


def measure_rates(width: int, spec: QuantSpec, device: torch.device) -> Rates:
    """Measure the rates for matrices of a width (the widest input of a block), quantised as `spec` says."""
    side = max(64, min(width, LARGEST_SIDE))
    generator = torch.Generator().manual_seed(0)

    def normal(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator).to(device)

    def timed(work: Callable[[], object]) -> float:
        return _seconds(work, device)

    single = normal(side, side)
    double = single.double()
    moment = double @ double.T / side + torch.eye(side, dtype=torch.float64, device=device)
    factor = factor_inverse(moment, 0.01, "natural")
    columns = normal(max(1, SEARCHED_ENTRIES // side), side)
    narrow = QuantSpec(spec.grid, scale_dtype=spec.scale_dtype, observer="minmax")
    sweeps = []
    for rows in SWEPT_ROWS:
        weight = normal(rows, side)
        qparams = choose_qparams(weight, narrow)
        swept = timed(lambda weight=weight, qparams=qparams: round_columns(weight, factor, qparams, narrow))
        sweeps.append(swept / side)
    product = 2 * side**3 / timed(lambda: linear(single, single))
    # Of an entry's seconds, the products of a sweep over this many columns are counted apart.
    entry = max(0.0, (sweeps[1] - sweeps[0]) / (SWEPT_ROWS[1] - SWEPT_ROWS[0]) - side / product)
    cells = torch.ones(OUT_OF_CACHE, device=device)
    codes = torch.zeros(256, 1024, dtype=torch.int8, device=device)
    whole = QuantSpec(spec.grid, observer=spec.observer, scale_dtype=spec.scale_dtype)
    on_columns = choose_qparams(columns, whole)
    return Rates(
        product=product,
        double_product=2 * side**3 / timed(lambda: double @ double),
        factor=4 / 3 * side**3 / timed(lambda: factor_inverse(moment, 0.01, "natural")),
        pass_over=3 * cells.nbytes / timed(lambda: cells + cells),
        search=columns.numel() / timed(lambda: choose_qparams(columns, whole)),
        rounding=columns.numel() / timed(lambda: quantize(columns, on_columns, whole).dequantize()),
        pack=codes.numel() / timed(lambda: pack_codes(codes, spec.grid.bits)),
        sweep_column=max(0.0, sweeps[0] - (entry + side / product) * SWEPT_ROWS[0]),
        sweep_entry=entry,
    )


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the shortest time of two after one that warms up."""

    def once() -> float:
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    once()
    return max(1e-9, min(once(), once()))
