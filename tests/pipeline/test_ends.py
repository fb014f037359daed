import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

from bitmend.errors import NumericsError, RecipeError
from bitmend.models.hf_causal_lm import HfCausalLm
from bitmend.numerics.observers import choose_qparams
from bitmend.numerics.qtensor import quantize as round_to_nearest
from bitmend.pipeline.ends import check_ends, quantise_ends
from bitmend.pipeline.recipe import parse_recipe

IDS = torch.arange(3, 27).reshape(2, 12)
NAMES = {"llama": ("model.embed_tokens", "lm_head"), "gpt2": ("transformer.wte", "lm_head")}


@pytest.fixture
def opened(tiny, tmp_path):
    def open_model(family="llama", dtype=torch.float32, **changes):
        return HfCausalLm.open(tiny.save(tmp_path / "source", tiny.build(family, dtype, **changes)))

    return open_model


def recipe(**sections):
    return parse_recipe({"solver": {"name": "rtn"}, **sections})


# ------------------------------------------------------------------------------------------------ the tensors
def test_without_sections_everything_stays(opened):
    adapter = opened()
    ends = quantise_ends(adapter, recipe())
    assert set(ends.tensors) == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert (ends.quantised, ends.kinds, ends.tied) == ({}, {}, {})
    original = load_file(adapter.folder / "model.safetensors")
    assert all(torch.equal(tensor, original[name]) for name, tensor in ends.tensors.items())


@pytest.mark.parametrize(("bits", "group_size"), [(8, -1), (4, 8), (2, 16)])
def test_embedding_and_head_are_rounded_to_nearest(opened, bits, group_size):
    adapter = opened()
    section = {"bits": bits, "group_size": group_size}
    ends = quantise_ends(adapter, recipe(embedding=section, head={**section, "observer": "minmax"}))
    assert ends.kinds == {"model.embed_tokens": "embedding", "lm_head": "linear"}
    assert ends.tied == {}
    original = load_file(adapter.folder / "model.safetensors")
    for name, observer in (("model.embed_tokens", "mse"), ("lm_head", "minmax")):
        qtensor = ends.quantised[name]
        assert (qtensor.spec.grid.bits, qtensor.spec.grid.symmetric, qtensor.spec.observer) == (bits, True, observer)
        weight = original[f"{name}.weight"]
        expected = round_to_nearest(weight, choose_qparams(weight, qtensor.spec), qtensor.spec)
        assert torch.equal(qtensor.codes, expected.codes)
        assert qtensor.qparams.scale.shape == (61, 1 if group_size == -1 else 16 // group_size)
        assert f"{name}.weight" not in ends.tensors
        assert f"{name}.weight_packed" in ends.tensors


def test_a_tied_head_uses_the_table_of_the_embedding(opened):
    ends = quantise_ends(opened("llama-tied"), recipe(embedding={"bits": 8}))
    assert ends.kinds == {"model.embed_tokens": "embedding"}
    assert ends.tied == {"lm_head": "model.embed_tokens"}
    assert not any(name.startswith("lm_head") for name in ends.tensors)


def test_position_embeddings_stay(opened):
    ends = quantise_ends(opened("gpt2"), recipe(embedding={"bits": 8}))
    assert set(ends.quantised) == {"transformer.wte"}
    assert "transformer.wpe.weight" in ends.tensors


# ------------------------------------------------------------------------------------------------ refused
def test_a_head_section_for_a_tied_model(opened):
    adapter = opened("llama-tied")
    with pytest.raises(RecipeError, match=r"the model's head is tied to its embedding; set embedding\.bits"):
        check_ends(adapter, recipe(head={"bits": 8}))
    check_ends(adapter, recipe(embedding={"bits": 8}))


@pytest.mark.parametrize("section", ["embedding", "head"])
def test_a_group_size_that_does_not_fit(opened, section):
    adapter = opened()
    with pytest.raises(RecipeError, match=rf"^{section}: group_size must divide .* divisors are 1, 2, 4, 8, 16"):
        check_ends(adapter, recipe(**{section: {"group_size": 7}}))
    check_ends(adapter, recipe(**{section: {"group_size": 4}}))


@pytest.mark.parametrize("section", ["embedding", "head"])
def test_group_size_zero_names_the_section(opened, section):
    with pytest.raises(RecipeError, match=rf"^{section}: group_size must be a positive number"):
        check_ends(opened(), recipe(**{section: {"group_size": 0}}))


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_bad_numbers_outside_the_blocks(opened, bad):
    adapter = opened()
    with torch.no_grad():
        adapter.model.get_submodule("model.norm").weight[3] = bad
    with pytest.raises(NumericsError, match=r"the tensor model\.norm\.weight must be finite, but holds NaN or Inf"):
        check_ends(adapter, recipe())


# ------------------------------------------------------------------------------------------------ the whole run
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_a_model_with_quantised_ends_loads_and_speaks_as_it_should(run_tiny, tmp_path, tiny, bits, family, tied, dtype):
    source = tiny.save(tmp_path / "source", tiny.build(family, dtype, tie_word_embeddings=tied))
    keys = {"embedding.bits": bits, "overrides": [{"targets": ["re:.*"], "skip": True}]}
    if not tied:
        keys["head.bits"] = bits
    run_tiny(model=source, recipe="rtn", keys=keys, calibration=[])
    output = tmp_path / "out"
    tensors = load_file(output / "model.safetensors")
    embedding, head = NAMES[family]
    assert f"{embedding}.weight" not in tensors
    assert (f"{head}.weight_packed" in tensors) is not tied
    manifest = json.loads((output / "config.json").read_text())["quantization_config"]
    assert manifest["tied"] == ({head: embedding} if tied else {})

    # In float32 whatever the file holds: bfloat16 activations differ by more than the tolerance may be.
    options = {"dtype": torch.float32}
    reference = transformers.AutoModelForCausalLM.from_pretrained(source, **options)
    ends = quantise_ends(
        HfCausalLm.open(source),
        recipe(embedding={"bits": bits}, **({} if tied else {"head": {"bits": bits}})),
    )
    with torch.no_grad():
        original = reference(IDS).logits
        for name, qtensor in ends.quantised.items():
            reference.get_submodule(name).weight.copy_(qtensor.dequantize())
        expected = reference(IDS).logits
        found = transformers.AutoModelForCausalLM.from_pretrained(output, **options)(IDS).logits
    scale = float(expected.abs().max())
    assert float((found - expected).abs().max()) <= 1e-5 * scale
    assert float((original - expected).abs().max()) > 1e-4 * scale
