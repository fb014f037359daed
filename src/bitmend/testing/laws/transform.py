"""Laws of transforms."""

from collections.abc import Callable

import torch
from torch import Tensor

from bitmend.calibrate.dual_stream import DualStream
from bitmend.pipeline.transforming import Transforms
from bitmend.protocols import ModelAdapter, TokenBatch, Transform

# Of the size of the logits after all blocks: models compute norms and softmax in float32, whatever their dtype.
ROUNDING = 1e-5


def exact_keeps_the_function(transform: Transform, open_model: Callable[[], ModelAdapter], batch: TokenBatch) -> None:
    """With all its blocks transformed and nothing rounded, the model gives the logits that it gave before.

    Args:
        transform: says `exact`.
        open_model: opens the same model in float64 each time.
        batch: some tokens.
    """
    assert transform.exact
    plain = logits_of(open_model(), [], batch)
    kept = logits_of(open_model(), [transform], batch)
    assert plain.dtype == torch.float64
    assert float((kept - plain).norm()) <= ROUNDING * float(plain.norm())


def applying_is_repeatable(transform: Transform, open_model: Callable[[], ModelAdapter], batch: TokenBatch) -> None:
    """A block that is read and transformed again is the same bit for bit, as resuming a run needs."""
    states = [_states(open_model(), transform, batch) for _ in range(2)]
    for one, other in zip(*states, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def logits_of(adapter: ModelAdapter, parts: list[Transform], batch: TokenBatch) -> Tensor:
    """Return the logits of a model whose blocks are transformed one after the other, as a run does it."""
    transforms = Transforms(adapter, parts, batch)
    transforms.begin_()
    streams = DualStream(adapter, [(batch, False)], device=torch.device("cpu"))
    for index in range(len(adapter.block_names)):
        adapter.load_block(index)
        transforms.apply_(adapter.describe_block(index, batch), streams)
        streams.run_quantised_(index)
        adapter.release_block(index)
    return adapter.logits(streams.x_q[0], batch)


def _states(adapter: ModelAdapter, transform: Transform, batch: TokenBatch) -> list[dict[str, Tensor]]:
    transforms = Transforms(adapter, [transform], batch)
    transforms.begin_()
    streams = DualStream(adapter, [(batch, False)], device=torch.device("cpu"))
    states = []
    for index in range(len(adapter.block_names)):
        adapter.load_block(index)
        transforms.apply_(adapter.describe_block(index, batch), streams)
        states.append({name: tensor.clone() for name, tensor in adapter.block_tensors(index).items()})
        streams.run_quantised_(index)
        adapter.release_block(index)
    return states


TRANSFORM_LAWS = [exact_keeps_the_function, applying_is_repeatable]
