"""Attention with rounded operands: beside the models' own functions, beside the equations, and where it is refused."""

import pytest
import torch
from tests.models.families import EXPERT_FAMILIES, FAMILIES

from bitmend.errors import ModelError
from bitmend.linalg.hadamard import Rotation
from bitmend.models.attention import (
    NAMES,
    Prepared,
    attach_attention,
    attached_scheme,
    attend,
    find_attentions,
    use_rounding_attention_,
)
from bitmend.numerics.activations import ActivationSpec
from bitmend.online import AttentionScheme

IDS = torch.arange(3, 23).view(2, 10)
MASK = torch.tensor([[*[1] * 8, 0, 0], [1] * 10])
ALL = sorted(FAMILIES | EXPERT_FAMILIES)


def logits(model, **options):
    with torch.no_grad():
        return model(IDS, attention_mask=MASK, **options).logits


def attentions(model, family):
    stem = (FAMILIES | EXPERT_FAMILIES)[family].stem
    found = []
    for index, block in enumerate(model.get_submodule(stem)):
        found += find_attentions(f"{stem}.{index}", block, lambda: model(IDS, attention_mask=MASK))
    return found


def attach(model, sites, make):
    return [attach_attention(model.get_submodule(site.name), make(site)) for site in sites]


@pytest.mark.parametrize("family", ALL)
def test_every_family_attends_as_before_and_rotated_keys_change_nothing(tiny, family):
    exact = family in FAMILIES  # experts are not computed in float64
    model = tiny.build(family, torch.float64 if exact else torch.float32)
    before = logits(model)
    implementation = model.config._attn_implementation
    use_rounding_attention_(model)
    assert model.config._attn_implementation == NAMES[implementation]
    assert torch.equal(logits(model), before)  # nothing is attached
    sites = attentions(model, family)
    assert len(sites) == model.config.num_hidden_layers
    removals = attach(model, sites, lambda site: AttentionScheme(Rotation(site.key_width)))
    assert torch.allclose(logits(model), before, rtol=0, atol=1e-9 if exact else 1e-4)
    for remove in removals:
        remove()
    assert torch.equal(logits(model), before)
    # Rounding to 8 bits shows, and little; to 2 bits it shows more.
    errors = []
    for bits in (8, 2):
        spec = ActivationSpec(bits, symmetric=False, scale_bits=16)
        removals = attach(
            model, sites, lambda site, spec=spec: AttentionScheme(Rotation(site.key_width), keys=spec, values=spec)
        )
        errors.append(float((logits(model) - before).abs().max()))
        for remove in removals:
            remove()
    assert 0 < errors[0] < errors[1]


def operands(heads=4, key_heads=2, tokens=5, width=8):
    draw = torch.Generator().manual_seed(0)
    shapes = ((2, heads, tokens, width), (2, key_heads, tokens, width), (2, key_heads, tokens, width))
    return [torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes]


def by_loops(query, key, value, scheme):
    """Each head and token by itself, from the definition; causal."""
    out = torch.zeros(2, query.shape[2], query.shape[1], value.shape[-1], dtype=torch.float64)
    hadamard = Rotation(query.shape[-1]).matrix()
    for row in range(2):
        for head in range(query.shape[1]):
            shared = head * key.shape[1] // query.shape[1]
            for token in range(query.shape[2]):
                q = scheme.queries.round(query[row, head, token] @ hadamard)
                scores = torch.zeros(query.shape[2], dtype=torch.float64)
                for past in range(query.shape[2]):
                    k = scheme.keys.round(key[row, shared, past] @ hadamard)
                    scores[past] = q @ k / query.shape[-1] ** 0.5 if past <= token else -torch.inf
                weights = scheme.probabilities.round(scores.float().softmax(0)).double()
                for past in range(token + 1):
                    out[row, token, head] += weights[past] * scheme.values.round(value[row, shared, past])
    return out


@pytest.mark.parametrize("mask", ["none", "boolean", "added"])
def test_by_loops(mask):
    scheme = AttentionScheme(
        Rotation(8),
        ActivationSpec(6),
        ActivationSpec(5, symmetric=False, scale_bits=16),
        ActivationSpec(5, symmetric=False, scale_bits=16),
        ActivationSpec(6, symmetric=False),
    )
    module = torch.nn.Linear(1, 1)
    module.num_key_value_groups = 2
    attach_attention(module, scheme)
    query, key, value = operands()
    allowed = torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
    given = {
        "none": None,
        "boolean": allowed,
        "added": torch.zeros(1, 1, 5, 5, dtype=torch.float64).masked_fill(~allowed, torch.finfo(torch.float64).min),
    }[mask]
    got, weights = attend(module, query, key, value, given, scaling=8**-0.5)
    assert torch.allclose(got, by_loops(query, key, value, scheme), rtol=0, atol=1e-6)
    assert len(torch.unique((weights[0, 0, -1] / weights[0, 0, -1].max() * 63).round())) <= 5
    # One token after the other gives the same: what is rounded does not depend on what comes later.
    last, _ = attend(module, query[:, :, -1:], key, value, None, scaling=8**-0.5)
    assert torch.allclose(last[:, 0], got[:, -1], rtol=0, atol=1e-6)


def test_what_a_cache_has_prepared_is_not_rounded_again():
    spec = ActivationSpec(3, clip_ratio=0.7, scale_bits=16)
    scheme = AttentionScheme(Rotation(8), keys=spec, values=spec)
    module = torch.nn.Linear(1, 1)
    module.num_key_value_groups = 2
    attach_attention(module, scheme)
    query, key, value = operands()
    wanted, _ = attend(module, query, key, value, None)
    ready = scheme.of_keys(key).as_subclass(Prepared)[:, :, :], scheme.of_values(value).as_subclass(Prepared)
    assert isinstance(ready[0], Prepared)  # a slice keeps the mark
    got, _ = attend(module, query, *ready, None)
    assert torch.equal(got, wanted)
    assert type(got) is torch.Tensor
    twice, _ = attend(module, query, scheme.of_keys(key), scheme.of_values(value), None)
    assert not torch.allclose(twice, wanted)


def test_a_model_that_is_told_to_attend_otherwise_fails(tiny):
    model = tiny.build()
    use_rounding_attention_(model)
    module = model.model.layers[1].self_attn
    remove = attach_attention(module, AttentionScheme(keys=ActivationSpec(4), values=ActivationSpec(4)))
    assert attached_scheme(module) is not None
    assert attached_scheme(model.model.layers[0].self_attn) is None
    model.set_attn_implementation("eager")
    with pytest.raises(ModelError, match=r"must attend by bitmend_sdpa or bitmend_eager.*told to attend by 'eager'"):
        logits(model)
    remove()
    logits(model)


def test_models_that_attend_by_themselves_are_refused():
    import transformers

    model = transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=20, hidden_size=16, n_layer=1, n_head=2))
    with pytest.raises(ModelError, match="BloomForCausalLM attends by itself; leave kv_cache and attention out"):
        use_rounding_attention_(model)


def test_probabilities_with_something_unknown_are_refused():
    module = torch.nn.Linear(1, 1)
    attach_attention(module, AttentionScheme(probabilities=ActivationSpec(8, symmetric=False)))
    with pytest.raises(ModelError, match=r"attends with s_aux, which rounding its probabilities does not know"):
        attend(module, *operands(), None, s_aux=torch.zeros(4))


def test_padding_gets_no_weights():
    module = torch.nn.Linear(1, 1)
    attach_attention(module, AttentionScheme(probabilities=ActivationSpec(8, symmetric=False)))
    got, _ = attend(module, *operands(), torch.zeros(1, 1, 5, 5, dtype=torch.bool))
    assert bool((got == 0).all())
