"""Refuse a run over experts that too few calibration tokens reach, before hours are spent on it.

The full-precision network says where its router sends the calibration rows; this takes one forward. The quantised network,
whose tokens count in the end, sends some of them elsewhere, so that a run may still be refused later, at the layer where that
is seen.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitmend.calibrate.dual_stream import DualStream
from bitmend.calibrate.experts import LayerInputs, refusal
from bitmend.errors import CalibrationError
from bitmend.protocols import Batch, ModelAdapter, Progress
from bitmend.routing import RareExperts
from bitmend.sites import Block, LinearSite


def refuse_rare_experts(
    adapter: ModelAdapter,
    batches: Sequence[tuple[Batch, bool]],
    rare: RareExperts,
    is_quantised: Callable[[LinearSite], bool],
    progress: Progress,
    *,
    device: torch.device,
    directory: Path | None,
    trace: Batch,
) -> None:
    """Run the full-precision network block by block and count the tokens of each expert.

    Args:
        adapter: the opened model.
        batches: calibration rows and whether they are held out.
        rare: how many tokens are required.
        is_quantised: whether a site is quantised at all.
        progress: shown block by block.
        device: where blocks run.
        directory: where activations are kept; None keeps them in memory.
        trace: a few tokens that show the structure of a block.

    Raises:
        CalibrationError: an expert that too few tokens reach; names the first.

    Cost: every block is read once more and run once; two streams of activations.
    """
    streams = DualStream(adapter, batches, directory=directory, device=device)
    names = adapter.block_names
    try:
        for index in progress.track(range(len(names)), "counting the tokens of experts", len(names)):
            adapter.load_block(index)
            block = adapter.describe_block(index, trace)
            _count(streams, block, rare, is_quantised)
            adapter.release_block(index)
    finally:
        streams.close()


def _count(streams: DualStream, block: Block, rare: RareExperts, is_quantised: Callable[[LinearSite], bool]) -> None:
    groups = [(group, group.expert) for group in block.groups if any(map(is_quantised, group.sites))]
    wanted = [(group, expert) for group, expert in groups if expert is not None]
    layers = {expert.experts: LayerInputs(block.module.get_submodule(expert.experts)) for _, expert in wanted}
    with ExitStack() as hooks:
        for path, layer in layers.items():
            hook = _counter(layer, streams)
            hooks.callback(block.module.get_submodule(path).register_forward_pre_hook(hook).remove)
        streams.run_full_precision_(block.index)
    for group, expert in wanted:
        found = layers[expert.experts].tokens(expert.number, group.sites[0].shape[1], rare)
        if found.treatment != "own":
            raise CalibrationError(refusal(f"{block.name}.{expert.path}", found))


def _counter(layer: LayerInputs, streams: DualStream) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def count(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        del module
        batch = streams.batches[len(layer.held_out)]
        layer.add_(arguments[0], arguments[1], batch.tokens, held_out=batch.held_out)

    return count
