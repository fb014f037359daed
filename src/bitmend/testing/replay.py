"""A model run block by block from disk, for tests and benchmarks that compare it with the model's own forward."""

import torch
from torch import Tensor

from bitmend.protocols import Batch, ModelAdapter


@torch.no_grad()
def replay(adapter: ModelAdapter, batch: Batch) -> Tensor:
    """Return what a model gives on some rows, each block read, run and forgotten in turn.

    Cost: one pass, each block's tensors read once.
    """
    inputs = adapter.block_inputs(batch)
    hidden: Tensor = inputs.hidden
    for index in range(len(adapter.block_names)):
        adapter.load_block(index)
        hidden = adapter.run_block(index, hidden, inputs)
        adapter.release_block(index)
    return adapter.logits(hidden, batch)
