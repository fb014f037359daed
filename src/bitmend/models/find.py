"""Which adapter reads a model."""

from pathlib import Path
from typing import Any

import torch

from bitmend.errors import ModelError
from bitmend.models.architecture import (
    TOWERS,
    architecture_name,
    modules_found,
    refuse_quantised,
    tower_config,
    two_towers,
)
from bitmend.models.loading import read_config, resolve_model
from bitmend.protocols import ADAPTERS, ModelAdapter


def find_adapter(
    model: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    trust_remote_code: bool = False,
    tower: str | None = None,
) -> ModelAdapter:
    """Open a local folder or a hub name with the first adapter that can read it.

    An adapter says so in its class method `why_not(config)`, and opens the folder in `open`.

    Args:
        model: folder or hub name.
        dtype: None for the model's own.
        device: where to compute; None for the CPU.
        trust_remote_code: allow code that comes with the model.
        tower: which part of a model with two towers.

    Raises:
        ModelError: no adapter reads the architecture, or the model cannot be loaded.
        CheckpointError: its files are damaged.
    """
    folder = resolve_model(model)
    config = read_config(folder, trust_remote_code)
    refuse_quantised(config, folder)
    if tower is not None:
        config = tower_config(config, tower)
    elif two_towers(config):
        raise ModelError(
            f"{folder} holds {architecture_name(config)}, which has two towers; pass --tower {' or --tower '.join(TOWERS)}"
        )
    reasons: list[str] = []
    for entry in ADAPTERS:
        reason = entry.part.why_not(config)
        if reason is None:
            opened: Any = entry.part.open(
                folder,
                dtype=dtype,
                device=device or torch.device("cpu"),
                trust_remote_code=trust_remote_code,
                tower=tower,
            )
            adapter: ModelAdapter = opened
            return adapter
        reasons.append(f"{entry.name}: {reason}")
    raise ModelError(
        f"no adapter reads {architecture_name(config)} in {folder} ({'; '.join(reasons)}); {modules_found(config)}; "
        "give a model of another architecture, or register an adapter for this one"
    )
