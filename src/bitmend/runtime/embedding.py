"""Token embedding and output head with packed weights, apart or sharing one matrix."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bitmend.numerics.qtensor import QTensor, QuantSpec
from bitmend.runtime.dispatch import linear_kernel
from bitmend.runtime.linear import apply_keeping_scale, model_dtype, register_model_dtype
from bitmend.runtime.packed import PackedWeight, fill_packed_, pack, packed_of, register_packed


class QuantEmbedding(nn.Module):
    """A table of vectors, one row a token, that stays packed in memory; only the rows asked for are unpacked.

    The constructor makes uninitialised buffers, to be filled by a loader; `from_qtensor` makes a finished layer.

    Attributes:
        weight_packed: the codes, int32 (tokens, ceil(features * bits / 32)).
        weight_scale: the scales in the type in which they are stored, (tokens or 1, groups).
        weight_zero_point: packed zero points, int32 (ceil(rows * bits / 32), groups); asymmetric grids only.
        spec: how to read the table.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        spec: QuantSpec,
        *,
        padding_idx: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.spec = num_embeddings, embedding_dim, spec
        self.padding_idx = padding_idx
        device = None if device is None else torch.device(device)
        register_packed(self, self.shape, spec, device)
        register_model_dtype(self, dtype, device)

    @classmethod
    def from_qtensor(cls, qtensor: QTensor, dtype: torch.dtype | None = None) -> "QuantEmbedding":
        """Return an embedding that holds `qtensor`, packed, and gives vectors in `dtype`."""
        num_embeddings, embedding_dim = qtensor.codes.shape
        layer = cls(num_embeddings, embedding_dim, qtensor.spec, dtype=dtype, device="meta")
        fill_packed_(layer, pack(qtensor))
        register_model_dtype(layer, dtype, None)
        return layer

    @property
    def shape(self) -> tuple[int, int]:
        """(tokens, features)."""
        return self.num_embeddings, self.embedding_dim

    @property
    def packed(self) -> PackedWeight:
        """The table, as a view of the buffers."""
        return packed_of(self, self.shape, self.spec)

    @property
    def weight(self) -> Float[Tensor, "tokens features"]:
        """The whole table in the model's dtype, made anew each time; for model code that asks for it by this name."""
        return self.dequantize(model_dtype(self))

    def forward(self, ids: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch features"]:
        """Return one vector for each id; an id outside the table is an IndexError."""
        vectors = self.packed.take(ids.reshape(-1), model_dtype(self))
        return vectors.view(*ids.shape, self.embedding_dim)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "tokens features"]:
        """Return the table as a plain matrix."""
        return self.packed.dequantize(dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.spec}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        return apply_keeping_scale(self, super()._apply, fn, recurse)


class TiedQuantHead(nn.Module):
    """An output head that multiplies by the packed table of an embedding.

    It registers no tensor of the table itself, so the table is counted, saved and moved once, with the embedding.

    Attributes:
        bias: (tokens,) or None.
    """

    def __init__(self, embedding: QuantEmbedding, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        # In a tuple, so that the module is not found as a child of this one.
        self._shared = (embedding,)
        self.bias = bias

    @property
    def embedding(self) -> QuantEmbedding:
        """The embedding whose table is used."""
        return self._shared[0]

    @property
    def in_features(self) -> int:
        """Width of the hidden states."""
        return self.embedding.embedding_dim

    @property
    def out_features(self) -> int:
        """How many tokens there are."""
        return self.embedding.num_embeddings

    @property
    def weight(self) -> Float[Tensor, "tokens features"]:
        """The whole shared table in the model's dtype, made anew each time."""
        return self.embedding.weight

    def forward(self, inputs: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch tokens"]:
        """Return one logit for each token."""
        packed = self.embedding.packed
        return linear_kernel(packed.words.device, packed.spec)(inputs, packed, self.bias)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "tokens features"]:
        """Return the shared table as a plain matrix."""
        return self.embedding.dequantize(dtype)
