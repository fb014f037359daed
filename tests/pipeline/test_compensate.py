"""Maps beside the blocks of models that are quantised already."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from bitmend.compensation import CHILD
from bitmend.errors import CheckpointError, ModelError, RecipeError, RequestError
from bitmend.formats.compressed_tensors import CompressedTensors
from bitmend.formats.gptq import GptqFormat
from bitmend.pipeline.compensate import compensate
from bitmend.pipeline.run import quantize
from bitmend.testing.fuzz.folders import GROUP, _awq

ROWS = {"calibration.sequences": 8, "calibration.sequence_length": 12}
KEPT = {"structure": "full", "gate": "in_sample"}  # so that random models keep their maps
IDS = torch.arange(3, 23).view(1, 20)


def maps_of(folder):
    return {name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if f".{CHILD}." in name}


def logits(folder):
    with torch.no_grad():
        return transformers.AutoModelForCausalLM.from_pretrained(folder)(IDS).logits


def same(one, other):
    assert one.keys() == other.keys()
    assert one
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("target", ["local", "trajectory"])
@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "mixtral"])
def test_equals_what_a_recipe_with_a_compensator_makes(run_tiny, tiny, tiny_text, tmp_path, family, target):
    """Round-to-nearest does not look at the streams, so that fitting later is fitting at once, bit for bit."""
    folder = tiny.save(tmp_path / "model", tiny.build(family))
    method = {**KEPT, "target": target}
    run_tiny("plain", model=folder, recipe="rtn", keys={"weights.bits": 3})
    run_tiny("once", model=folder, recipe="rtn", keys={"weights.bits": 3, "compensators": [{"name": "qwt", **method}]})
    report = compensate(
        tmp_path / "plain", folder, [tiny_text], output=tmp_path / "later", overrides={**ROWS, **method}
    )
    assert same(maps_of(tmp_path / "once"), maps_of(tmp_path / "later"))
    assert same(load_file(tmp_path / "once" / "model.safetensors"), load_file(tmp_path / "later" / "model.safetensors"))
    assert torch.equal(logits(tmp_path / "once"), logits(tmp_path / "later"))
    assert not torch.equal(logits(tmp_path / "plain"), logits(tmp_path / "later"))
    assert report.bits["quantised_layers"] > 3
    assert json.loads((tmp_path / "later" / "run.json").read_text())["status"] == "done"


def test_rotated_and_rounded_inputs_come_along(run_tiny, tiny_model, tiny_text, tmp_path):
    keys = {
        "weights.group_size": -1,
        "activations.bits": 4,
        "kv_cache.bits": 4,
        "transforms": [{"name": "quarot", "residual": False, "force": True}],
    }
    run_tiny("plain", recipe="rtn", keys=keys)
    run_tiny("once", recipe="rtn", keys={**keys, "compensators": [{"name": "qwt", **KEPT}]})
    compensate(tmp_path / "plain", tiny_model, [tiny_text], output=tmp_path / "later", overrides={**ROWS, **KEPT})
    assert torch.allclose(logits(tmp_path / "once"), logits(tmp_path / "later"), atol=0.05)
    assert not torch.allclose(logits(tmp_path / "plain"), logits(tmp_path / "later"), atol=0.05)


@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_models_of_pictures(family, pictures, tmp_path, request):
    keys = {
        "calibration.sequences": 16,
        "weights.observer": "minmax",
        "activations.bits": 4,
        "activations.static": True,
        "activations.symmetric": False,
        "activations.observer": "percentile",
    }
    source = request.getfixturevalue(family)
    method = {**KEPT, "target": "trajectory"}
    quantize(source, "rtn", [pictures], output=tmp_path / "plain", overrides=keys)
    compensate(
        tmp_path / "plain",
        source,
        [pictures],
        output=tmp_path / "later",
        overrides={"calibration.sequences": 16, **method},
    )
    shapes = json.loads((tmp_path / "later" / "config.json").read_text())["quantization_config"]["compensations"]
    assert all(one["clamped"] == (family == "resnet") for one in shapes.values())
    assert all(one["channels_first"] == (family == "resnet") for one in shapes.values())
    if family == "resnet":
        assert {one["stride"] for one in shapes.values()} == {1, 2}
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "later")
    found = model(pixel_values=torch.randn(2, 3, 8, 8)).logits
    assert bool(found.isfinite().all())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("tool", [CompressedTensors().export, GptqFormat().export, _awq])
def test_codes_of_other_tools_are_taken_over(run_tiny, tiny, tiny_text, tmp_path, tool, symmetric):
    if tool is _awq and symmetric:
        pytest.skip("AWQ has zero points")
    folder = tiny.save(tmp_path / "model", tiny.build(hidden_size=64, intermediate_size=64, num_attention_heads=4))
    keys = {"weights.bits": 4, "weights.group_size": GROUP, "weights.scale_dtype": "float16"}
    run_tiny("plain", model=folder, recipe="rtn", keys={**keys, "weights.symmetric": symmetric})
    tool(tmp_path / "plain", tmp_path / "other")
    method = {**ROWS, **KEPT}
    compensate(tmp_path / "plain", folder, [tiny_text], output=tmp_path / "ours", overrides=method)
    compensate(tmp_path / "other", folder, [tiny_text], output=tmp_path / "theirs", overrides=method)
    # A reader may lay scales and zero points out otherwise; the maps say that the weights were the same.
    ours, theirs = maps_of(tmp_path / "ours"), maps_of(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.allclose(tensor.double(), theirs[name].double(), rtol=1e-2, atol=1e-3), name
    assert torch.allclose(logits(tmp_path / "ours"), logits(tmp_path / "theirs"), atol=1e-2)


def test_a_reference_that_does_not_match(run_tiny, tiny, tiny_text, tmp_path):
    run_tiny("plain", recipe="rtn", keys={"weights.bits": 3})
    torch.manual_seed(77)
    other = tiny.build()
    with torch.no_grad():
        for tensor in other.parameters():
            if tensor.ndim == 2:
                tensor.copy_(torch.randn_like(tensor))
    others = {
        "of other weights": tiny.save(tmp_path / "weights", other),
        "of another width": tiny.save(tmp_path / "width", tiny.build(intermediate_size=40)),
        "of fewer blocks": tiny.save(tmp_path / "blocks", tiny.build(num_hidden_layers=1)),
        "of more blocks": tiny.save(tmp_path / "more", tiny.build(num_hidden_layers=3)),
        "of another family": tiny.save(tmp_path / "family", tiny.build("gpt2")),
    }
    for reference in others.values():
        with pytest.raises(ModelError, match="the reference is not the model"):
            compensate(tmp_path / "plain", reference, [tiny_text], output=tmp_path / "out", overrides=ROWS)
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "out.partial").exists()


def test_a_sibling_of_the_reference_is_refused(run_tiny, tiny, tiny_text, tmp_path):
    run_tiny("plain", recipe="rtn", keys={"weights.bits": 3, "embedding.bits": 8})
    torch.manual_seed(0)
    other = tiny.build()
    with torch.no_grad():
        other.model.embed_tokens.weight.mul_(1 + 0.3 * torch.randn_like(other.model.embed_tokens.weight))
    sibling = tiny.save(tmp_path / "sibling", other)
    for name, keys in (("plain", {"embedding.bits": 8}), ("unrounded", {})):
        run_tiny(name, recipe="rtn", keys={"weights.bits": 3, **keys}, overwrite=True)
        with pytest.raises(ModelError, match=r"their model\.embed_tokens.* differ"):
            compensate(tmp_path / name, sibling, [tiny_text], output=tmp_path / "out", overrides=ROWS)


def test_a_folder_without_one_of_its_tensors_is_refused(run_tiny, tiny_model, tiny_text, tmp_path):
    run_tiny("plain", recipe="rtn", keys={"weights.bits": 4, "weights.group_size": 8})
    path = tmp_path / "plain" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.norm.weight"]
    save_file(tensors, path, {"format": "pt"})
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    config["quantization_config"]["files"] = {}
    (tmp_path / "plain" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"has model\.norm\.weight, which the quantised model lacks"):
        compensate(tmp_path / "plain", tiny_model, [tiny_text], output=tmp_path / "out", overrides=ROWS)


def test_neither_model_is_overwritten(run_tiny, tiny, tiny_text, tmp_path):
    reference = tiny.save(tmp_path / "reference", tiny.build())
    run_tiny("plain", model=reference, recipe="rtn", keys={"weights.bits": 3})
    for folder in (reference, tmp_path / "plain"):
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        for output in (folder, folder / "inside"):
            with pytest.raises(RequestError, match="must lie outside the model folder"):
                compensate(tmp_path / "plain", reference, [tiny_text], output=output, overwrite=True, overrides=ROWS)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_an_output_that_exists_is_told_before_anything_is_drawn(run_tiny, tiny_model, tmp_path):
    run_tiny("plain", recipe="rtn", keys={"weights.bits": 3})
    (tmp_path / "out").mkdir()
    with pytest.raises(RequestError, match="out exists"):
        compensate(tmp_path / "plain", tiny_model, [tmp_path / "no.txt"], output=tmp_path / "out", overrides=ROWS)


def test_requests_that_cannot_be(run_tiny, tiny_model, tiny_text, tmp_path):
    run_tiny("plain", recipe="rtn", keys={"weights.bits": 3})

    def run(model="plain", rows=None, **overrides):
        compensate(
            model if model == tiny_model else tmp_path / model,
            tiny_model,
            [tiny_text] if rows is None else rows,
            output=tmp_path / "out",
            overrides={**ROWS, **overrides},
        )

    with pytest.raises(RequestError, match="not quantised"):
        run(tiny_model)
    with pytest.raises(RequestError, match="calibration"):
        run(rows=[])
    with pytest.raises(RecipeError, match="structure"):
        run(structur="full")
    with pytest.raises(RequestError, match="compensator and of calibration"):
        run(**{"weights.bits": 4})
    run(**KEPT)
    (tmp_path / "out").rename(tmp_path / "done")
    with pytest.raises(RequestError, match="maps beside its blocks already"):
        run("done")
    run_tiny("rotated", recipe="rtn", keys={"transforms": [{"name": "quarot", "force": True}]})
    with pytest.raises(ModelError, match=r"their model\.embed_tokens.* differ"):
        run("rotated")
    damaged = tmp_path / "plain" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-4] + b"abcd")
    with pytest.raises(CheckpointError):
        run()
