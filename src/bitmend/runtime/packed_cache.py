"""A cache of keys and values that keeps them as the model rounds them: codes, packed, with their scales.

transformers' own caches work with these models, too, and give the same results: they keep keys and values unrounded, which
are then rounded whenever they are read.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int8, Int32
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from bitmend.errors import RequestError
from bitmend.models.attention import Prepared, attached_scheme
from bitmend.numerics.activations import ActivationSpec, TokenCodes
from bitmend.online import AttentionScheme
from bitmend.packing.bits import pack_codes, unpack_codes


@dataclass(frozen=True)
class _Kept:
    """Keys or values of all tokens so far."""

    words: Int32[Tensor, "batch heads token words"]
    scale: Float[Tensor, "batch heads token groups"]
    zero_point: Int8[Tensor, "batch heads token groups"] | None
    width: int

    @classmethod
    def pack(cls, values: Float[Tensor, "batch heads token width"], spec: ActivationSpec) -> "_Kept":
        tokens = spec.encode(values)
        width = values.shape[-1]
        words = pack_codes(tokens.codes.reshape(-1, width), spec.bits)
        return cls(words.view(*values.shape[:-1], -1), tokens.scale, tokens.zero_point, width)

    def values(self, spec: ActivationSpec, dtype: torch.dtype) -> Float[Tensor, "batch heads token width"]:
        codes = unpack_codes(self.words.reshape(-1, self.words.shape[-1]), spec.bits, self.width)
        shape = (*self.words.shape[:-1], self.width)
        return spec.decode(TokenCodes(codes.view(shape), self.scale, self.zero_point), dtype)

    def followed_by(self, other: "_Kept") -> "_Kept":
        pairs = zip(self._tensors(), other._tensors(), strict=True)
        return self._of([torch.cat(pair, dim=2) for pair in pairs])

    def changed(self, change: Callable[[Tensor], Tensor]) -> "_Kept":
        return self._of([change(tensor) for tensor in self._tensors()])

    def num_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self._tensors())

    def _tensors(self) -> list[Tensor]:
        return [self.words, self.scale, *([] if self.zero_point is None else [self.zero_point])]

    def _of(self, tensors: list[Tensor]) -> "_Kept":
        return _Kept(tensors[0], tensors[1], tensors[2] if len(tensors) > 2 else None, self.width)


class PackedLayer(CacheLayerMixin):
    """Keys and values of one layer, packed."""

    is_sliding = False
    is_croppable = True

    def __init__(self, scheme: AttentionScheme) -> None:
        """Prepare an empty layer of a module that attends by `scheme`."""
        super().__init__()
        if scheme.keys is None or scheme.values is None:
            raise ValueError("a packed layer needs keys and values that are rounded")
        self.scheme = scheme
        self._specs = (scheme.keys, scheme.values)
        self._kept: tuple[_Kept, _Kept] | None = None
        self._home: torch.device | None = None  # where the states were before they were taken to the host

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: what is kept is made by the first `update`."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values (batch, heads, token, width) and return those of all tokens, rotated and rounded."""
        del args, kwargs
        keys = key_states if self.scheme.rotation is None else self.scheme.rotation.apply(key_states)
        new = tuple(_Kept.pack(one, spec) for one, spec in zip((keys, value_states), self._specs, strict=True))
        held = self._kept
        self._kept = new if held is None else tuple(a.followed_by(b) for a, b in zip(held, new, strict=True))  # type: ignore[assignment]
        self.is_initialized = True
        assert self._kept is not None
        states = zip(self._kept, self._specs, (key_states.dtype, value_states.dtype), strict=True)
        all_keys, all_values = (kept.values(spec, dtype).as_subclass(Prepared) for kept, spec, dtype in states)
        return all_keys, all_values

    def num_bytes(self) -> int:
        """Return what is held, in bytes."""
        return 0 if self._kept is None else sum(kept.num_bytes() for kept in self._kept)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many tokens the next call sees, and from which on."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Return how many tokens are held."""
        return 0 if self._kept is None else self._kept[0].words.shape[2]

    def get_max_length(self) -> int:
        """Return that there is no limit."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self._kept, self.is_initialized = None, False

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; as transformers', the number is negative."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a negative number of tokens to remove; got {tokens_to_remove}")
        if tokens_to_remove:
            self._change(lambda tensor: tensor[:, :, :tokens_to_remove])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take rows in another order, for beam search."""
        self._change(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        self._change(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        self._change(lambda tensor: tensor[indices, ...])

    def offload(self) -> None:
        """Move to the host's memory."""
        self._home = None if self._kept is None else self._kept[0].words.device
        self._change(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move back."""
        home = self._home
        if home is not None:
            self._change(lambda tensor: tensor.to(home, non_blocking=True))

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        if self._kept is not None:
            keys, values = self._kept
            self._kept = keys.changed(change), values.changed(change)


class PackedCache(Cache):
    """Packed keys and values of all layers; give it to `generate` as `cache` (`past_key_values` in older transformers).

    Layers whose keys and values are not rounded are kept as they are. A layer with a sliding window keeps all tokens.
    """

    def __init__(self, model: nn.Module) -> None:
        """Prepare an empty cache for a loaded model.

        Raises:
            RequestError: nothing of the model's attention is rounded.
        """
        schemes: dict[int, AttentionScheme] = {}
        for module in model.modules():
            scheme, index = attached_scheme(module), getattr(module, "layer_idx", None)
            if scheme is not None and scheme.keys is not None and scheme.values is not None and isinstance(index, int):
                schemes[index] = scheme
        if not schemes:
            raise RequestError(
                "a packed cache needs a model that rounds its keys and values, but this one does not; quantise it with a "
                "[kv_cache] section, or use the cache of transformers"
            )
        config: Any = model.config
        count = max(*schemes, config.get_text_config().num_hidden_layers - 1) + 1
        layers = [PackedLayer(schemes[index]) if index in schemes else DynamicLayer() for index in range(count)]
        super().__init__(layers=layers)

    def num_bytes(self) -> int:
        """Return what the packed layers hold, in bytes."""
        return sum(layer.num_bytes() for layer in self.layers if isinstance(layer, PackedLayer))


def cache_option(model: nn.Module) -> dict[str, PackedCache]:
    """Return an empty packed cache under the name by which a model of the installed transformers takes one."""
    named = inspect.signature(model.forward).parameters
    return {"cache" if "cache" in named else "past_key_values": PackedCache(model)}


def rounds_keys_and_values(model: nn.Module) -> bool:
    """Return whether a loaded model rounds keys and values somewhere."""
    schemes = (attached_scheme(module) for module in model.modules())
    return any(scheme is not None and scheme.keys is not None for scheme in schemes)
