"""What models of transformers have in common, whatever they read: blocks that lie on disk until they are loaded."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitmend.models.tensor_source import TensorSource, outside


class HfBlocks:
    """A model of transformers whose blocks are read one at a time; all else is loaded.

    Attributes:
        model: blocks are on meta until `load_block`.
        folder: where the model comes from.
        config: of transformers, as read from the folder.
        dtype: of the loaded weights and of the activations.
        device: where all of it is.
        block_names: full paths of the blocks in the order in which they run.
    """

    block_names: tuple[str, ...]

    def __init__(self, model: nn.Module, folder: Path, config: Any, source: TensorSource) -> None:
        self.model = model
        self.folder = folder
        self.config = config
        self.dtype: torch.dtype = source.dtype
        self.device: torch.device = source.device
        self._source = source

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
