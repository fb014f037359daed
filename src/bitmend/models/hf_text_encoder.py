"""Text encoders of transformers, block by block from disk: BERT and its like, and CLIP's text tower; see `hf_tokens.py`.

They read a text as a whole, and what they give is an embedding: of each token, or, where a projection stands behind the
last block, of the text. Texts of different lengths are padded on the right, and what attends is told where.
"""

from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bitmend.errors import ModelError
from bitmend.models.architecture import encoder_class, two_towers
from bitmend.models.detour import Probe
from bitmend.models.hf_tokens import HfTokens
from bitmend.models.tensor_source import TensorSource
from bitmend.protocols import ADAPTERS, Batch
from bitmend.sites import ModelEnds


@ADAPTERS.register("hf_text_encoder")
class HfTextEncoder(HfTokens):
    """Text encoders of transformers, told apart by structure and not by name.

    Attributes:
        head_names: paths of the projections that make the embedding of a text. A pooler, as BERT has one, is none: whoever
            averages over tokens does not read it.
    """

    wanted: ClassVar[str] = "a text encoder"
    options: ClassVar[dict[str, Any]] = {}

    def __init__(self, model: nn.Module, folder: Path, config: Any, source: TensorSource) -> None:
        """Find the blocks of an empty model and load the rest; use `open` instead."""
        self._behind: list[str] = []
        super().__init__(model, folder, config, source)
        self.head_names = tuple(self._behind)

    @classmethod
    def why_not(cls, config: Any) -> str | None:
        """Return why this adapter cannot read a model of `config`, or None when it may try."""
        if two_towers(config):
            return "it has two towers, of which one has to be chosen"
        return None if encoder_class(config, "tokens") else "it is no text encoder"

    @classmethod
    def task_of(cls, config: Any) -> str:
        """Return the class of transformers that builds such a model."""
        found = encoder_class(config, "tokens")
        assert found is not None
        return found

    def answer(self, output: Any) -> Tensor:
        """Return the embedding of each text, where the model makes one, else of each token."""
        found = output.get("text_embeds")
        states: Tensor = output.last_hidden_state if found is None else found
        return states

    def ends(self, batch: Batch) -> ModelEnds:
        """Refuse: an encoder has no head over a vocabulary."""
        raise ModelError(
            f"{self._what()} has no head over a vocabulary, which a transform of the whole model needs; take transforms of "
            "single blocks only"
        )

    @torch.no_grad()
    def _check(self, seen: Probe) -> None:
        """Refuse a model in which something else than the next block reads what a block returns; find what lies behind it."""
        del seen
        last, batch = len(self.block_names) - 1, self.few_rows()
        read: list[Any] = []

        def replace(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            read.append((args[1:], {key: value for key, value in kwargs.items() if value is not hidden}))
            return self._form.wrap(torch.ones_like(hidden) if index == last else torch.full_like(hidden, torch.nan))

        def note(name: str) -> Any:
            return lambda *_: self._behind.append(name) if len(read) > last else None

        with ExitStack() as hooks, self._detour(replace):
            for name, part in self.model.named_children():
                if isinstance(part, nn.Linear):
                    hooks.callback(part.register_forward_pre_hook(note(name)).remove)
            given = self.answer(self.model(**self._call(batch)))
        tensors = [leaf for leaf in tree_leaves(read) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        if not bool(given.isfinite().all()) or any(bool(tensor.isnan().any()) for tensor in tensors):
            raise ModelError(
                f"{self._what()} reads what a block returns in another place than the next block, or gives what is not "
                "finite; this architecture needs an adapter of its own"
            )
