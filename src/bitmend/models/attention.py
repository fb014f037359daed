"""Attention of transformers' models with rounded operands: queries, keys, values, and the weights that they get.

transformers asks a table of functions for the one that attends. Two of them are ours (`NAMES`): without a scheme on the
module they are torch's fused attention (`sdpa`), or the model's own (`eager`), to the last bit; with one (`attach_attention`)
they rotate and round what comes in. Models that attend by themselves, without asking that table, are refused. Keys and values
that come from a cache which keeps them rounded are marked as such (`Prepared`) and taken as they are.

A module may hold the keys and values of a prefix: they are put in front of all others, whatever the cache holds, and every
query looks at them. Their positions are those before 0, so that nothing else moves.
"""

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from bitmend.errors import ModelError
from bitmend.online import PREFIX_KEY, PREFIX_VALUE, AttentionScheme, PrefixShape
from bitmend.sites import AttentionSite

NAMES = {"sdpa": "bitmend_sdpa", "eager": "bitmend_eager"}
_PLACE = "_bitmend_attention"  # on a module: what is attached to it
# What models pass on that changes nothing here, or has been accounted for in the mask.
_KNOWN = {
    "dropout",
    "scaling",
    "is_causal",
    "softcap",
    "sliding_window",
    "position_ids",
    "cache_position",
    "use_cache",
    "cache",
}
_watchers: list[Callable[[nn.Module, Tensor, Tensor, Tensor], None]] = []


class Prepared(Tensor):
    """Keys or values that have been rotated and rounded already; what is made of them keeps the mark."""


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """Attend as transformers' `sdpa` does; see the module.

    Args:
        module: that attends.
        query: (batch, heads, token, width); with the position embedding, as keys.
        key: (batch, key heads, all tokens, width).
        value: (batch, key heads, all tokens, value width).
        attention_mask: boolean or to be added, broadcast over (batch, heads, token, all tokens); None for causal.
        options: of the model.

    Returns:
        (batch, token, heads, value width), and the weights where they were computed one by one.
    """
    return _attend(sdpa_attention_forward, module, query, key, value, attention_mask, options)


def attend_eagerly(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """Attend as the model's own function does, which knows what `sdpa` does not (soft caps, sinks); otherwise as `attend`."""
    own = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if own is None:
        raise ModelError(
            f"rounding keys and values needs {type(module).__name__} to attend by a function of its file named "
            "eager_attention_forward, but there is none; leave kv_cache and attention out of the recipe"
        )
    return _attend(own, module, query, key, value, attention_mask, options)


def _attend(
    function: Callable[..., tuple[Tensor, Tensor | None]],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    for watch in _watchers:
        watch(module, query, key, value)
    scheme = attached_scheme(module)
    if scheme is not None:
        query = scheme.of_queries(query)
        key = key.as_subclass(Tensor) if isinstance(key, Prepared) else scheme.of_keys(key)
        value = value.as_subclass(Tensor) if isinstance(value, Prepared) else scheme.of_values(value)
        if scheme.prefix is not None:
            mask = _mask_with_prefix(module, scheme.prefix, query, key, mask, options)
            key, value = _with_prefix(module, scheme, key, value)
        if scheme.probabilities is not None:
            return _one_by_one(module, scheme, query, key, value, mask, options)
    return function(module, query, key, value, mask, **options)


def _with_prefix(module: nn.Module, scheme: AttentionScheme, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    first_key, first_value = module.get_buffer(PREFIX_KEY), module.get_buffer(PREFIX_VALUE)
    batch = len(key)
    keys = scheme.of_prefix_keys(first_key).to(key).expand(batch, -1, -1, -1)
    values = first_value.to(value).expand(batch, -1, -1, -1)
    return torch.cat([keys, key], dim=2), torch.cat([values, value], dim=2)


def _mask_with_prefix(
    module: nn.Module, prefix: PrefixShape, query: Tensor, key: Tensor, mask: Tensor | None, options: dict[str, Any]
) -> Tensor | None:
    """Return a mask by which every query also looks at the prefix, which stands in front of the keys."""
    queries, keys = query.shape[2], key.shape[2]
    if mask is None:
        causal = options.get("is_causal")
        if queries == 1 or not (getattr(module, "is_causal", True) if causal is None else causal):
            return None
        mask = _causal(queries, keys, query.device).expand(1, 1, -1, -1)
    visible = 1 if mask.dtype == torch.bool else 0
    return torch.cat([mask.new_full((*mask.shape[:-1], prefix.tokens), visible), mask[..., :keys]], dim=-1)


def _causal(queries: int, keys: int, device: torch.device) -> Tensor:
    """Return what a missing mask stands for: a token looks at those before it, a single one at all.

    transformers leaves the mask out for several queries only where they begin at the first key, which need not be the last
    that there is room for (a cache of fixed length).
    """
    seen = torch.ones(queries, keys, dtype=torch.bool, device=device)
    return seen if queries == 1 else seen.tril()


def _one_by_one(
    module: nn.Module,
    scheme: AttentionScheme,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """Attend with rounded weights, which a fused function does not let anybody touch."""
    unknown = {name for name, given in options.items() if given is not None and not name.startswith("output_")} - _KNOWN
    if unknown:
        raise ModelError(
            f"{type(module).__name__} attends with {', '.join(sorted(unknown))}, which rounding its "
            "probabilities does not know; leave attention.probability_bits out"
        )
    repeats = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, repeats), repeat_kv(value, repeats)
    scaling = options.get("scaling")
    scores = (query @ key.transpose(2, 3)).float() * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    softcap = options.get("softcap")
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    causal = options.get("is_causal")
    if mask is None and (getattr(module, "is_causal", True) if causal is None else causal):
        mask = _causal(scores.shape[-2], scores.shape[-1], scores.device)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    assert scheme.probabilities is not None
    # A row that may look at nothing (padding) has no softmax; it gets no weights.
    weights = scheme.probabilities.round(scores.softmax(-1).nan_to_num(0)).to(value.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def attach_attention(module: nn.Module, scheme: AttentionScheme) -> Callable[[], None]:
    """Let a module attend as `scheme` says, until what is returned is called.

    The module then fails when its model has been told to attend in another way, which would round nothing. Where the scheme
    has a prefix, the module must hold its tensors (`hold_prefix_`).
    """

    def check(module: nn.Module, arguments: Any) -> None:
        del arguments
        chosen = getattr(getattr(module, "config", None), "_attn_implementation", NAMES["sdpa"])
        if chosen not in NAMES.values():
            raise ModelError(
                f"{type(module).__name__} must attend by {' or '.join(NAMES.values())}, which round its keys and values, but "
                f"its model was told to attend by {chosen!r}; load it again"
            )

    handle: RemovableHandle = module.register_forward_pre_hook(check)
    setattr(module, _PLACE, scheme)

    def remove() -> None:
        handle.remove()
        if attached_scheme(module) is scheme:
            delattr(module, _PLACE)

    return remove


def hold_prefix_(module: nn.Module, keys: Tensor, values: Tensor) -> None:
    """Let a module hold the keys and values of a prefix as tensors of its state, (heads, tokens, width) each."""
    module.register_buffer(PREFIX_KEY, keys)
    module.register_buffer(PREFIX_VALUE, values)


def drop_prefix_(module: nn.Module) -> None:
    """Let a module forget the prefix that it holds, if it does."""
    for name in (PREFIX_KEY, PREFIX_VALUE):
        if name in module._buffers:
            delattr(module, name)


def attached_scheme(module: nn.Module) -> AttentionScheme | None:
    """Return how a module attends, or None when nothing is attached to it."""
    scheme: AttentionScheme | None = getattr(module, _PLACE, None)
    return scheme


def use_rounding_attention_(model: Any) -> None:
    """Let a model of transformers attend by a function of ours, which changes nothing until schemes are attached.

    Raises:
        ModelError: it attends by itself, or in a way that has no like here.
    """
    before = model.config._attn_implementation
    if before in NAMES.values():
        return
    if before not in NAMES:
        raise ModelError(
            f"rounding keys, values or attention needs a model that attends by {' or '.join(NAMES)}, but "
            f"{type(model).__name__} was asked to attend by {before!r}; load it with attn_implementation='sdpa'"
        )
    if not model._can_set_attn_implementation():
        raise ModelError(
            f"rounding keys, values or attention needs a model that attends by a function of transformers' table, but "
            f"{type(model).__name__} attends by itself; leave kv_cache and attention out of the recipe"
        )
    model.set_attn_implementation(NAMES[before])


@contextmanager
def watching(watch: Callable[[nn.Module, Tensor, Tensor, Tensor], None]) -> Iterator[None]:
    """Call `watch(module, query, key, value)` each time that a module attends by `attend`."""
    _watchers.append(watch)
    try:
        yield
    finally:
        _watchers.remove(watch)


def find_attentions(name: str, block: nn.Module, run: Callable[[], Any]) -> tuple[AttentionSite, ...]:
    """Run a block and return where it attends by `attend`, in the order in which it does.

    Args:
        name: full path of the block.
        block: loaded.
        run: runs it on a few tokens.
    """
    paths = {module: path for path, module in block.named_modules()}
    found: dict[str, AttentionSite] = {}

    def note(module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> None:
        path = paths.get(module)
        if path is not None:
            sizes = (query.shape[1], key.shape[1], key.shape[-1], value.shape[-1])
            found[path] = AttentionSite(f"{name}.{path}" if path else name, path, *sizes)

    with watching(note):
        run()
    return tuple(found.values())


for _name, _function, _mask in (("sdpa", attend, sdpa_mask), ("eager", attend_eagerly, eager_mask)):
    ALL_ATTENTION_FUNCTIONS.register(NAMES[_name], _function)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAMES[_name], _mask)
