"""What models of transformers have in common, whatever they read: blocks that lie on disk until they are loaded."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bitmend.errors import ModelError
from bitmend.models.architecture import architecture_name, modules_found, refuse_quantised, tower_config
from bitmend.models.attention import use_rounding_attention_
from bitmend.models.bounds import stored
from bitmend.models.experts import unpack_experts_
from bitmend.models.loading import AUTO_MODEL, empty_model, read_config
from bitmend.models.shards import ShardedWeights
from bitmend.models.tensor_source import TensorSource, buffers_to, outside
from bitmend.numerics.products import FastLinear
from bitmend.protocols import Batch, BlockInputs

CPU = torch.device("cpu")
# Not typing.Self: beartype checks methods one by one here, and takes it inside decorated classes only.
Opened = TypeVar("Opened", bound="HfBlocks")


class HfBlocks(ABC):
    """A model of transformers whose blocks are read one at a time; all else is loaded.

    Attributes:
        wanted: such a model in words, for error sentences.
        tower: which part of a model with two towers this is; None where it is a whole model.
        model: blocks are on meta until `load_block`.
        folder: where the model comes from.
        config: of transformers, as read from the folder; of a tower, its part of it.
        dtype: of the loaded weights and of the activations.
        device: where all of it is.
        block_names: full paths of the blocks in the order in which they run.
    """

    tower: str | None = None
    wanted: ClassVar[str]
    block_names: tuple[str, ...]
    _trusted = False

    def __init__(self, model: nn.Module, folder: Path, config: Any, source: TensorSource) -> None:
        self.model = model
        self.folder = folder
        self.config = config
        self.dtype: torch.dtype = source.dtype
        self.device: torch.device = source.device
        self._source = source

    # ------------------------------------------------------------------------------------------ opening
    @classmethod
    @abstractmethod
    def why_not(cls, config: Any) -> str | None:
        """Return why this adapter cannot read a model of `config`, or None when it may try."""

    @classmethod
    @abstractmethod
    def task_of(cls, config: Any) -> str:
        """Return the class of transformers that builds a model of `config`: an Auto class, or the model's own."""

    @property
    def task(self) -> str:
        """The class of transformers that loads such models: an Auto class where there is one."""
        task = self.task_of(self.config)
        return task if task.startswith("Auto") or self.tower is not None or task.endswith("Projection") else AUTO_MODEL

    @classmethod
    def open(
        cls: type[Opened],
        folder: Path,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device = CPU,
        trust_remote_code: bool = False,
        tower: str | None = None,
    ) -> Opened:
        """Open a model folder and load what lies outside the blocks.

        Args:
            folder: with config.json and weights.
            dtype: None for the model's own: that of the config, else that of the stored tensors.
            device: where to compute.
            trust_remote_code: allow code that comes with the model.
            tower: `vision` or `text`: that part of a model with two towers, such as CLIP.

        Raises:
            ModelError: the folder is incomplete, quantised already, or of an architecture that is not read here.
            CheckpointError: the files are damaged or do not belong to the config.
        """
        config = read_config(folder, trust_remote_code)
        refuse_quantised(config, folder)
        if tower is not None:
            config = tower_config(config, tower)
        reason = cls.why_not(config)
        if reason is not None:
            raise ModelError(
                f"{folder} holds {architecture_name(config)}, and {reason}; {modules_found(config)}; give {cls.wanted}"
            )
        held = stored(folder)
        weights = ShardedWeights(folder)
        dtype = dtype or own_dtype(config) or weights.floating_dtype
        model = empty_model(config, dtype, trust_remote_code, held, task=cls.task_of(config))
        unpack_experts_(model)
        buffers_to(model, device)
        source = TensorSource(model, weights, dtype=dtype, device=device)
        opened = cls._of(model, folder, config, source, trust_remote_code)
        opened._trusted, opened.tower = trust_remote_code, tower
        return opened

    @classmethod
    def _of(
        cls: type[Opened], model: nn.Module, folder: Path, config: Any, source: TensorSource, trust_remote_code: bool
    ) -> Opened:
        """Return the adapter of an empty model."""
        del trust_remote_code
        return cls(model, folder, config, source)

    def reopened(self: Opened, dtype: torch.dtype) -> Opened:
        """Return the same model opened once more, in another dtype."""
        return self.open(
            self.folder, dtype=dtype, device=self.device, trust_remote_code=self._trusted, tower=self.tower
        )

    # ------------------------------------------------------------------------------------------ running
    @abstractmethod
    def forward_block(
        self, index: int, hidden: Float[Tensor, "batch *features"], inputs: BlockInputs
    ) -> Float[Tensor, "batch *made"]:
        """Run one loaded block with gradients, if they are on."""

    @abstractmethod
    def forward_logits(self, hidden: Float[Tensor, "batch *features"], batch: Batch) -> Float[Tensor, "batch *label"]:
        """Run everything after the last block with gradients, if they are on."""

    @torch.no_grad()
    def run_block(
        self, index: int, hidden: Float[Tensor, "batch *features"], inputs: BlockInputs
    ) -> Float[Tensor, "batch *made"]:
        """Run one loaded block, its matrix products by the fastest way on this machine."""
        with FastLinear():
            return self.forward_block(index, hidden, inputs)

    @torch.no_grad()
    def logits(self, hidden: Float[Tensor, "batch *features"], batch: Batch) -> Float[Tensor, "batch *label"]:
        """Run everything after the last block."""
        return self.forward_logits(hidden, batch)

    def prepare_attention_(self) -> None:
        """Let the model attend by a function that can round its operands, and does not yet."""
        use_rounding_attention_(self.model)

    # ------------------------------------------------------------------------------------------ weights
    def load_block(self, index: int) -> nn.Module:
        """Read one block's tensors from the checkpoint and return the block."""
        prefix = f"{self.block_names[index]}."
        self._source.fill(name for name in self._source.names if name.startswith(prefix))
        return self.block(index)

    def release_block(self, index: int) -> None:
        """Forget one block's tensors."""
        self._source.clear(self.block(index))

    def block(self, index: int) -> nn.Module:
        """Return the block as it stands, loaded or not."""
        return self.model.get_submodule(self.block_names[index])

    def block_tensors(self, index: int) -> dict[str, Tensor]:
        """Return what a loaded block holds, under the names of the whole model."""
        prefix = f"{self.block_names[index]}."
        return {prefix + name: tensor for name, tensor in self.block(index).state_dict().items()}

    def outside_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield what lies outside the blocks as it stands, a tied head once, under the names to save it by."""
        held = self.model.state_dict(keep_vars=True)
        for name in outside(held, self.block_names):
            followed = self._source.ties.get(name)
            if followed is None or held[name] is not held[followed]:
                yield name, held[name].detach()

    def stored_name(self, name: str) -> str:
        """Return the name under which the source folder holds a tensor, where it differs from the module's path."""
        return self._source.stored_name(name)

    def _what(self) -> str:
        return f"{type(self.model).__name__} in {self.folder}"


def own_dtype(config: Any) -> torch.dtype | None:
    """Return the dtype that a config of transformers names, or None when it names none."""
    for one in (config, config.get_text_config()):
        dtype = getattr(one, "dtype", None)
        if isinstance(dtype, str):
            dtype = getattr(torch, dtype, None)
        if isinstance(dtype, torch.dtype):
            return dtype
    return None
