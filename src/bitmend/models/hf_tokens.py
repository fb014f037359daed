"""What models of transformers that read tokens have in common: blocks in one module list, found by structure.

Nothing here knows a model by name. The blocks are found by structure and by watching two tokens pass; what lies before
and after them is run by the model's own `forward`, with the blocks passing their input on, so embeddings, masks,
rotary tables, final norms, projections and soft caps are the model's own to the last bit. The one thing that is put in place
of the model's own are packed experts (`models/experts.py`).
"""

from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bitmend.errors import ModelError
from bitmend.models.architecture import module_lists
from bitmend.models.attention import find_attentions
from bitmend.models.detour import (
    BlockList,
    Probe,
    ReturnForm,
    candidate_lists,
    detour,
    first_reached,
    probe,
    split_hidden,
)
from bitmend.models.hf_blocks import HfBlocks
from bitmend.models.tensor_source import TensorSource, outside
from bitmend.models.tracing import describe, trace_block
from bitmend.models.wiring import find_wiring
from bitmend.protocols import Batch, BlockInputs, TokenBatch, tokens_of
from bitmend.sites import AttentionSite, Block, Wiring

TRACE_ROWS, TRACE_TOKENS = 4, 32
FEW_TOKENS = 8


class HfTokens(HfBlocks):
    """A model of transformers that reads tokens.

    Attributes:
        embedding_name: path of the token embedding.
        head_names: paths of the linear layers behind the last block that the recipe's `head` means.
    """

    reads: ClassVar[Literal["tokens", "pictures"]] = "tokens"
    first_layer: ClassVar[None] = None
    idle: ClassVar[tuple[str, ...]] = ()
    row_length: ClassVar[None] = None
    options: ClassVar[dict[str, Any]]  # of each call of the model
    head_names: tuple[str, ...]

    def __init__(self, model: nn.Module, folder: Path, config: Any, source: TensorSource) -> None:
        """Find the blocks of an empty model and load the rest; use `open` instead."""
        super().__init__(model, folder, config, source)
        self._blocks = self._load_outside()
        self.block_names = self._blocks.names
        seen = self._probe()
        self._form = seen.form
        self._check(seen)
        self.embedding_name = self._path_of("get_input_embeddings") or ""

    @abstractmethod
    def _check(self, seen: Probe) -> None:
        """Refuse a model that its blocks, in turn, do not make up, given what a pass of two rows has shown."""

    @abstractmethod
    def answer(self, output: Any) -> Tensor:
        """Return from what the model gives what `logits` returns."""

    # ------------------------------------------------------------------------------------------ running
    @torch.no_grad()
    def block_inputs(self, batch: Batch) -> BlockInputs:
        """Run everything before the first block and note with what each block is called."""
        hidden: list[Tensor] = []
        arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def record(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            del index
            passed, rest, options = split_hidden(args, kwargs)
            hidden.append(passed)
            arguments.append((rest, options))
            return self._form.wrap(passed)

        with self._detour(record):
            getattr(self.model, "base_model", self.model)(**self._call(batch))
        return BlockInputs(hidden[0], tuple(arguments))

    def forward_block(
        self, index: int, hidden: Float[Tensor, "batch *features"], inputs: BlockInputs
    ) -> Float[Tensor, "batch *made"]:
        """Run one loaded block with gradients, if they are on."""
        args, kwargs = inputs.arguments[index]
        return ReturnForm.unwrap(self.block(index)(hidden, *args, **kwargs))

    def forward_logits(self, hidden: Float[Tensor, "batch *features"], batch: Batch) -> Float[Tensor, "batch *label"]:
        """Run everything after the last block with gradients, if they are on."""
        last = len(self.block_names) - 1

        def replace(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return self._form.wrap(hidden if index == last else split_hidden(args, kwargs)[0])

        with self._detour(replace):
            return self.answer(self.model(**self._call(batch)))

    def few_rows(self) -> TokenBatch:
        """Return a few tokens that every vocabulary has; only the order of layers is read from them."""
        return _two_words(1, FEW_TOKENS)

    def sample_inputs(self, index: int, rows: int, length: int) -> tuple[Tensor, BlockInputs]:
        """Return the embedding of some tokens, which every block can read, and the arguments of the blocks."""
        del index
        inputs = self.block_inputs(_two_words(rows, length))
        return inputs.hidden, inputs

    def stream_width(self) -> int:
        """Return the features of the residual stream."""
        return int(self.block_inputs(self.few_rows()).hidden.shape[-1])

    def describe_block(self, index: int, batch: Batch) -> Block:
        """Run a few tokens through a loaded block and return its sites in execution order."""
        batch = tokens_of(batch)
        mask = None if batch.mask is None else batch.mask[:TRACE_ROWS, :TRACE_TOKENS]
        few = TokenBatch(batch.ids[:TRACE_ROWS, :TRACE_TOKENS], mask)
        inputs = self.block_inputs(few)
        block = self.block(index)
        trace = trace_block(block, lambda: self.run_block(index, inputs.hidden, inputs))
        return describe(self.block_names[index], index, block, trace, places=few.ids.numel())

    def wiring_of(self, block: Block, batch: Batch) -> Wiring:
        """Return how the layers of a loaded block hang together; runs it on a few tokens some times."""
        inputs = self.block_inputs(batch)
        return find_wiring(block, lambda: self.run_block(block.index, inputs.hidden, inputs), inputs.hidden.shape[-1])

    def attentions_of(self, block: Block, batch: Batch) -> tuple[AttentionSite, ...]:
        """Return where a loaded block attends; runs it on a few tokens. `prepare_attention_` comes first."""
        inputs = self.block_inputs(batch)
        return find_attentions(block.name, block.module, lambda: self.run_block(block.index, inputs.hidden, inputs))

    # ------------------------------------------------------------------------------------------ opening
    def _load_outside(self) -> BlockList:
        """Load all but the blocks and return the blocks."""
        candidates = candidate_lists(self.model)
        inside = [one.name for one in candidates]
        self._source.fill(outside(self._source.names, inside))
        self._source.tie()
        found = first_reached(candidates, self._two_rows)
        if found is None:
            raise ModelError(
                f"{self._what()} has no module list whose members are of one class, hold linear layers and run in the "
                f"forward; found {module_lists(self.model)}; this architecture needs an adapter of its own"
            )
        others = [name for name in inside if name != found.name]
        self._source.fill(name for name in self._source.names if name.startswith(tuple(f"{one}." for one in others)))
        return found

    def _probe(self) -> Probe:
        """Watch a few tokens pass and refuse what cannot be replayed block by block."""
        self.load_block(0)
        try:
            seen = probe(self._blocks.blocks, self._two_rows)
        finally:
            self.release_block(0)
        count = len(self._blocks.blocks)
        if seen.order != tuple(range(count)):
            raise ModelError(
                f"the {count} blocks of {self._what()} ({self._blocks.name}) run in the order {list(seen.order)}, need "
                "each once and in turn; this architecture needs an adapter of its own"
            )
        if seen.changed is not None:
            raise ModelError(
                f"block {seen.changed} of {self._what()} ({self._blocks.name}) is given something else than the block before "
                "it returns, so that a layer between them would be left out; this architecture needs an adapter of its own"
            )
        return seen

    @torch.no_grad()
    def _two_rows(self) -> Any:
        ids = torch.tensor([[1, 1], [1, 2]], device=self.device)
        try:
            return self.model(input_ids=ids, attention_mask=torch.ones_like(ids), **self.options)
        except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
            reason = " ".join(str(error).split())
            raise ModelError(
                f"{self._what()} could not run on two tokens ({type(error).__name__}: {reason}); found "
                f"{module_lists(self.model)}; this architecture needs an adapter of its own"
            ) from error

    # ------------------------------------------------------------------------------------------ small parts
    def _detour(self, forward: Any) -> Any:
        return detour([self.block(index) for index in range(len(self.block_names))], forward)

    def _call(self, batch: Batch) -> dict[str, Any]:
        batch = tokens_of(batch)
        call: dict[str, Any] = {"input_ids": batch.ids.to(self.device), **self.options}
        if batch.mask is not None:
            call["attention_mask"] = batch.mask.to(self.device, torch.long)
        if batch.first_position:
            positions = torch.arange(batch.ids.shape[1], device=self.device) + batch.first_position
            call["position_ids"] = positions.unsqueeze(0)
        return call

    def _path_of(self, getter: str) -> str | None:
        module = getattr(self.model, getter)()
        return next((name for name, part in self.model.named_modules() if part is module), None)


def _two_words(rows: int, length: int) -> TokenBatch:
    return TokenBatch((torch.arange(rows * length) % 2).view(rows, length))
