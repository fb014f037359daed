"""Write a solver of fifteen lines, register it, and use it by its name like any other.

This one always rounds down. It is meant to be worse than rounding to nearest, and the printed errors say how much: the mean
square error of the worst matrix, relative to the mean square of its weights.

Prints: ^relative error at 4 bits: rtn (?P<rtn>\\d+\\.\\d+), floor (?P<floor>\\d+\\.\\d+)$
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

import bitmend
from bitmend import assets
from bitmend.numerics.granularity import group_of_column
from bitmend.numerics.observers import choose_qparams
from bitmend.numerics.qtensor import QTensor
from bitmend.protocols import SOLVERS, Need, Problem, Solution


@SOLVERS.register("floor")
@dataclass(frozen=True)
class Floor:
    """Round every weight down, to the level below it."""

    needs: ClassVar[frozenset[Need]] = frozenset()  # no moments: it looks at the weight alone

    def solve(self, problem: Problem) -> Solution:
        """Return the codes of the levels below the weights."""
        spec, weight = problem.spec, problem.weight
        qparams = choose_qparams(weight, spec)
        scale = qparams.scale[:, group_of_column(spec.granularity, weight.shape[1])]
        codes = torch.floor(weight / scale).clamp(spec.grid.min_code, spec.grid.max_code).to(torch.int8)
        return Solution(QTensor(codes, qparams, spec))


def worst_error(original: torch.nn.Module, folder: Path) -> float:
    """Return the largest relative mean square error of a matrix of the quantised model in `folder`."""
    quantised = bitmend.load(folder).state_dict()
    raise NotImplementedError(original, quantised)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        for name in ("rtn", "floor"):
            bitmend.quantize(assets.path("stories-260k"), name, output=Path(scratch) / name, bits=4, group_size=-1)
