"""Decoder language models of transformers, block by block from disk; see `hf_tokens.py`."""

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bitmend.errors import ModelError
from bitmend.models.architecture import module_lists, why_not_causal
from bitmend.models.detour import Probe
from bitmend.models.hf_tokens import HfTokens
from bitmend.models.loading import CAUSAL_LM
from bitmend.models.tensor_source import TensorSource
from bitmend.models.wiring import find_ends
from bitmend.protocols import ADAPTERS, Batch
from bitmend.sites import ModelEnds


@ADAPTERS.register("hf_causal_lm")
class HfCausalLm(HfTokens):
    """Decoder language models of transformers, told apart by structure and not by name.

    Attributes:
        head_names: path of the output head; none when it is tied to the embedding.
    """

    wanted: ClassVar[str] = "a decoder language model"
    options: ClassVar[dict[str, Any]] = {"use_cache": False}

    def __init__(self, model: nn.Module, folder: Path, config: Any, source: TensorSource) -> None:
        """Find the blocks of an empty model and load the rest; use `open` instead."""
        super().__init__(model, folder, config, source)
        head = self._path_of("get_output_embeddings")
        self.head_names = () if head is None or f"{head}.weight" in source.ties else (head,)

    @classmethod
    def why_not(cls, config: Any) -> str | None:
        """Return why this adapter cannot read a model of `config`, or None when it may try."""
        return why_not_causal(config)

    @classmethod
    def task_of(cls, config: Any) -> str:
        """Return the class of transformers that builds such a model."""
        del config
        return CAUSAL_LM

    def answer(self, output: Any) -> Tensor:
        """Return the logits."""
        logits: Tensor = output.logits
        return logits

    def ends(self, batch: Batch) -> ModelEnds:
        """Return what lies around the blocks; runs it on a few tokens."""
        hidden = self.block_inputs(batch).hidden
        tied = not self.head_names
        return find_ends(self.model, hidden.shape[-1], self.block_names, tied, lambda: self.logits(hidden, batch))

    def _check(self, seen: Probe) -> None:
        # The two rows differ in their second token only, so a causal block cannot tell them apart at the first.
        one, other = seen.first_output.float()[:, 0]
        slack = 4 * torch.finfo(self.dtype).eps * one.nan_to_num(0, 0, 0).abs().max().item()
        if not torch.allclose(one, other, rtol=0, atol=slack, equal_nan=True):
            raise ModelError(
                f"{self._what()} looks at later tokens, need a decoder that attends to the past only; "
                f"found {module_lists(self.model)}; give a decoder language model"
            )
