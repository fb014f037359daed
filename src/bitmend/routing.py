"""Mixtures of experts: where a matrix stands in one, which tokens reach it, and what is done where too few do.

A router sends each token to a few of many experts, so that an expert sees some of the calibration tokens only, or none.
Everything here speaks of token numbers and counts; modules that hold experts are in `models/experts.py`, what is measured of
them in `calibrate/experts.py`.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

RareChoice = Literal["pool", "rtn", "refuse"]


@dataclass(frozen=True)
class Expert:
    """Where a group of sites stands among the experts of a block.

    Attributes:
        experts: path in the block of the module that holds the experts.
        number: which of them.
        step: 0 for the matrices that read what enters the expert, 1 for those that read what the former have made.
    """

    experts: str
    number: int
    step: int

    @property
    def path(self) -> str:
        """Path of the expert in its block."""
        return f"{self.experts}.{self.number}"


@dataclass(frozen=True)
class RareExperts:
    """What is done with a matrix that too few of the calibration tokens reach.

    Attributes:
        choice: `pool`: measure it on all tokens of the layer; `rtn`: round it to nearest; `refuse`: end the run.
        min_tokens: how many tokens of the fit split are enough; None: as many as the matrix has inputs, since the second
            moments of fewer cannot have full rank.
    """

    choice: RareChoice = "pool"
    min_tokens: int | None = None

    def judge(self, fit: int, held_out: int | None, width: int) -> "ExpertTokens":
        """Return what follows from the tokens of both splits that reach a matrix with `width` inputs.

        `held_out` is None where no rows are held out; where some are, one token at least must prove the result.
        """
        required = max(1, width if self.min_tokens is None else self.min_tokens)
        enough = fit >= required and held_out != 0
        return ExpertTokens(fit, held_out, required, "own" if enough else self.choice)


@dataclass(frozen=True)
class ExpertTokens:
    """How many calibration tokens reach a matrix, and on what it is therefore solved.

    Attributes:
        fit: tokens of the fit split that the quantised network sends there.
        held_out: the same of the held-out split; None when no rows are held out.
        required: how many of the fit split are enough.
        treatment: `own`: on these tokens; else what `RareExperts.choice` says.
    """

    fit: int
    held_out: int | None
    required: int
    treatment: Literal["own", "pool", "rtn", "refuse"]

    def shortage(self) -> str:
        """Return in words what was too few."""
        if self.fit < self.required:
            return f"{self.fit} calibration tokens of the fit split reach this expert, but {self.required} are required"
        return "no calibration token of the held-out split reaches this expert, so that nothing can be proved"


def entries_by_expert(
    top_k_index: Int[Tensor, "token choice"], num_experts: int
) -> list[tuple[Int[Tensor, " entry"], Int[Tensor, " entry"]]]:
    """Return for each expert the tokens that are sent to it, ascending, and as which of its choices each token has it.

    Numbers that belong to no expert are left out.
    """
    chosen = top_k_index.reshape(-1).clamp(max=num_experts)
    order = chosen.argsort(stable=True)
    counts = torch.bincount(chosen, minlength=num_experts + 1)[:num_experts].tolist()
    choices = top_k_index.shape[-1]
    tokens, slots = order // choices, order % choices
    stops = [sum(counts[: number + 1]) for number in range(num_experts)]
    ranges = [slice(stop - count, stop) for stop, count in zip(stops, counts, strict=True)]
    return [(tokens[part], slots[part]) for part in ranges]
