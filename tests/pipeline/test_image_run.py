"""Runs over pictures: from class folders to a folder that transformers loads, for a transformer and a residual network."""

import json

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import nn

import bitmend
from bitmend.errors import CalibrationError, ModelError, RecipeError, RequestError
from bitmend.numerics.activations import ActivationSpec
from bitmend.numerics.log_sqrt2 import LogSqrt2Spec
from bitmend.pipeline.image_defaults import with_image_defaults
from bitmend.pipeline.recipe import load_recipe
from bitmend.pipeline.run import check_request, plan, quantize
from bitmend.runtime.conv import QuantConv2d
from bitmend.runtime.linear import QuantLinear

LABELS = {0: "cat", 1: "dog", 2: "fish"}
STATIC = {
    "activations.bits": 4,
    "activations.static": True,
    "activations.symmetric": False,
    "activations.observer": "percentile",
}
ATTENTION = {
    "attention.static": True,
    "attention.query_bits": 4,
    "attention.key_bits": 4,
    "attention.value_bits": 4,
    "attention.probability_bits": 4,
    "attention.probability_grid": "log_sqrt2",
}


@pytest.fixture
def run(tmp_path, pictures):
    def start(model, recipe="gptq", keys=None, output="out", **options):
        overrides = {"calibration.sequences": 16, "weights.observer": "minmax", **(keys or {})}
        return quantize(model, recipe, [pictures], output=tmp_path / output, overrides=overrides, **options)

    return start


def batch(count=4):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def sites_of(report):
    return {site.name: site for block in report.blocks for site in block.sites}


@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_what_is_loaded_computes_what_the_codes_say(family, run, request, tmp_path):
    source = request.getfixturevalue(family)
    report = run(source)
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    dense = transformers.AutoModelForImageClassification.from_pretrained(source)
    names = [name for name, part in loaded.named_modules() if isinstance(part, (QuantLinear, QuantConv2d))]
    assert set(names) == set(sites_of(report)) | {"classifier"}
    with torch.no_grad():
        for name in names:
            layer = dense.get_submodule(name)
            layer.weight.copy_(loaded.get_submodule(name).dequantize(torch.float32).reshape(layer.weight.shape))
        expected, found = dense(pixel_values=batch()).logits, loaded(pixel_values=batch()).logits
    assert torch.allclose(found, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_the_layer_that_reads_pictures_and_the_head_have_eight_bits(family, run, request, tmp_path):
    report = run(request.getfixturevalue(family), keys={"weights.bits": 3, **STATIC})
    modules = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    account = bitmend.ledger(tmp_path / "out")
    bits = {row.name: row.code_bits for row in account.rows if row.code_bits is not None}
    first = next(iter(sites_of(report)))
    assert bits.pop(first) == 8
    assert bits.pop("classifier") == 8
    assert set(bits.values()) == {3}
    assert modules["inputs"][first]["activations"]["bits"] == 8
    assert modules["inputs"]["classifier"]["activations"]["bits"] == 8


def test_static_ranges_and_levels_are_those_of_the_recipe(run, vit, tmp_path):
    run(vit, keys=STATIC | ATTENTION)
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    manifest = loaded.config.quantization_config.manifest
    spec = manifest.inputs["vit.layers.0.mlp.fc2"].activations
    assert isinstance(spec, ActivationSpec)
    assert (spec.bits, spec.symmetric, len(spec.ranges), len(spec.lows)) == (4, False, 1, 1)
    scheme = manifest.attentions["vit.layers.1.attention"]
    assert isinstance(scheme.probabilities, LogSqrt2Spec)
    assert 0 < scheme.probabilities.range <= 1
    assert scheme.queries.ranges is not None
    assert scheme.values.lows[0] < 0
    seen = {}

    def keep(module, arguments):
        seen["levels"] = len(arguments[0].unique())

    # Hooks run in the order in which they were attached, so that this one sees what has been rounded.
    loaded.get_submodule("vit.layers.0.mlp.fc2").register_forward_pre_hook(keep)
    with torch.no_grad():
        loaded(pixel_values=batch())
    assert 2 < seen["levels"] <= 16


def test_the_error_that_is_reported_is_that_of_the_finished_model(run, vit, tmp_path):
    """Both streams end where the two models end: the blocks' last error is that of what enters the last norm."""
    report = run(vit, keys={"weights.bits": 4, "calibration.held_out": 0.5, **STATIC})
    dense = transformers.AutoModelForImageClassification.from_pretrained(vit)
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    from bitmend.calibrate.images import load_images
    from bitmend.models.image_processor import load_processor

    source = [report.calibration["source"].rpartition(" (")[0]]
    rows = load_images(source, load_processor(vit), images=16, held_out=0.5, seed=0)
    assert rows.fingerprint == report.calibration["sha256"]
    pixels = rows.pixels[rows.held_out]
    ends = []
    for model in (dense, loaded):
        kept = []
        handle = model.vit.layernorm.register_forward_pre_hook(lambda module, given, kept=kept: kept.append(given[0]))
        with torch.no_grad():
            model(pixel_values=pixels)
        handle.remove()
        ends.append(kept[0].double())
    error = float((ends[0] - ends[1]).square().sum() / ends[0].square().sum())
    assert report.blocks[-1].relative_error == pytest.approx(error, rel=1e-4)
    assert error > 1e-4


@pytest.mark.parametrize("solver", ["rtn", "gptaq", "marr", "erq", "descent"])
def test_every_solver_takes_convolutions(solver, run, resnet):
    report = run(resnet, solver, {"weights.bits": 4})
    errors = [site.held_out_error for site in sites_of(report).values() if site.held_out_error is not None]
    assert solver == "rtn" or len(errors) == 7
    assert report.status == "done"


def test_gptq_of_a_convolution_is_gptq_of_its_patches(run, resnet, tmp_path, pictures):
    """The second layer's codes, from patches that are cut out by hand."""
    from bitmend.linalg.moments import MomentSums
    from bitmend.models.find import find_adapter
    from bitmend.protocols import Problem
    from bitmend.sites import LinearSite
    from bitmend.solvers.gptq import Gptq

    report = run(resnet, keys={"calibration.held_out": 0.0, "weights.bits": 3})
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    dense = transformers.AutoModelForImageClassification.from_pretrained(resnet).eval()
    from bitmend.calibrate.images import load_images
    from bitmend.models.image_processor import load_processor

    rows = load_images([pictures], load_processor(resnet), images=16, held_out=0.0, seed=0)
    with torch.no_grad():
        hidden = loaded.stem(rows.pixels)
    padded = nn.functional.pad(hidden, (1, 1, 1, 1))
    patches = torch.stack(
        [padded[i, :, y : y + 3, x : x + 3].flatten() for i in range(16) for y in range(8) for x in range(8)]
    )
    sums = MomentSums(36, cross=False, residual=False, device=torch.device("cpu"))
    sums.add_(patches, None)
    names = list(sites_of(report))
    weight = dense.get_submodule(names[1]).weight.detach().flatten(1)
    recipe = with_image_defaults(
        load_recipe("gptq", {"weights.bits": 3, "weights.observer": "minmax"}), find_adapter(resnet).first_layer
    )
    spec = recipe.scheme(names[1], torch.float32)
    expected = Gptq().solve(Problem(LinearSite("x", "x", "conv2d", (4, 36)), weight, spec, sums.means())).qtensor
    found = loaded.get_submodule(names[1]).dequantize(torch.float32)
    assert torch.equal(found, expected.dequantize())


def test_a_run_that_was_stopped_ends_in_the_same_files(run, vit, tmp_path, monkeypatch):
    from bitmend.pipeline.resume import Journal

    keys = STATIC | ATTENTION | {"transforms": [{"name": "repq", "force": True}]}
    run(vit, keys=keys, output="whole")
    for stop in (1, 9):
        seen = []

        def keep(journal, solved, seen=seen, stop=stop, real=Journal.keep_site):
            real(journal, solved)
            seen.append(solved)
            if len(seen) == stop:
                raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(Journal, "keep_site", keep)
            with pytest.raises(KeyboardInterrupt):
                run(vit, keys=keys, output=f"stopped{stop}")
        run(vit, keys=keys, output=f"stopped{stop}", resume=True)
        for name in ("model.safetensors", "ledger.json"):
            assert (tmp_path / f"stopped{stop}" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
        configs = [json.loads((tmp_path / one / "config.json").read_text()) for one in ("whole", f"stopped{stop}")]
        assert configs[0]["quantization_config"]["inputs"] == configs[1]["quantization_config"]["inputs"]


def test_evaluation_of_pictures(run, vit, tmp_path, pictures):
    run(vit, keys={"weights.bits": 8})
    report = bitmend.evaluate([tmp_path / "out", vit], images=[pictures], reference=vit)
    ours, itself = (model.images[0] for model in report.models)
    assert ours.count == itself.count == 24
    assert itself.kl == 0.0
    assert itself.top1_agreement == 1.0
    assert itself.top1 == itself.reference_top1 == ours.reference_top1
    assert 0 < ours.kl < 1e-2
    assert itself.top1_low <= itself.top1 <= itself.top1_high
    model = transformers.AutoModelForImageClassification.from_pretrained(vit)
    right = 0
    for label, name in LABELS.items():
        for path in sorted((pictures / name).iterdir()):
            pixels = (torch.tensor(np.array(Image.open(path))).permute(2, 0, 1) / 255 - 0.5) / 0.25
            with torch.no_grad():
                right += int(model(pixel_values=pixels.unsqueeze(0)).logits.argmax()) == label
    assert itself.top1 == right / 24


def test_the_plan_counts_pictures(vit, pictures):
    made = plan(vit, load_recipe("gptq", {"calibration.sequences": 16}), [pictures])
    assert made.forecast.host_bytes > 0
    assert sum(batch.tokens for batch in made.facts.batches) == 16
    without = plan(vit, load_recipe("gptq", {"calibration.sequences": 16}))
    assert [batch.rows for batch in without.facts.batches] == [batch.rows for batch in made.facts.batches]


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"kv_cache.bits": 4, "attention.key_bits": 4, "attention.static": True}, "give one of them"),
        ({"attention.key_bits": 4}, "attention.key_bits needs static ranges"),
        ({"activations.observer": "mse"}, "set activations.static = true"),
        ({"activations.static": True, "activations.after_gelu": "twin"}, "after_gelu needs an observer"),
        ({"head.activation_bits": 4}, "activation_bits are for recipes that round activations"),
        ({"embedding.activation_bits": 4}, "unknown key 'embedding.activation_bits'"),
        ({"activations.static": True, "activations.symmetric": False}, "need an observer"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(keys, sentence):
    with pytest.raises(RecipeError, match=sentence):
        load_recipe("gptq", keys)


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"embedding.bits": 8}, "no token embedding"),
        ({"prefix.tokens": [1]}, "a prefix are tokens in front of a text"),
        ({"calibration.sequence_length": 8}, "pictures have no sequence_length"),
        ({"transforms": [{"name": "quarot"}]}, "take transforms of single blocks only"),
        ({"activations.bits": 4}, "is a convolution, whose input needs one range for all"),
        (
            STATIC | {"overrides": [{"targets": ["vit.layers.0.attention.q_proj"], "activation_bits": 8}]},
            "give them the same activation_bits",
        ),
    ],
)
def test_what_is_for_texts_is_refused(keys, sentence, run, vit):
    with pytest.raises((RequestError, RecipeError, ModelError), match=sentence):
        run(vit, keys=keys)


def test_attention_keys_for_a_model_that_does_not_attend(run, resnet):
    with pytest.raises(ModelError, match="needs a model that attends"):
        run(resnet, keys=STATIC | ATTENTION)


def test_a_text_for_a_model_of_pictures(vit, tiny_text, tmp_path):
    with pytest.raises(CalibrationError, match=r"a folder of pictures, a \.tar, .* but there is a file of another"):
        check_request(vit, "gptq", [tiny_text], output=tmp_path / "out")


def test_the_defaults_can_be_set(vit, run):
    report = run(
        vit,
        keys={
            "weights.bits": 4,
            "weights.group_size": 8,
            "head.bits": 4,
            "overrides": [{"targets": ["vit.embeddings.patch_embeddings.projection"], "bits": 6}],
        },
    )
    recipe = report.recipe
    assert recipe["weights"]["group_size"] == 8
    assert recipe["head"]["bits"] == 4
    assert "6 bit" in sites_of(report)["vit.embeddings.patch_embeddings.projection"].spec


def test_what_is_for_language_models_is_refused_in_one_sentence(vit, pictures, tiny_text, run, tmp_path):
    from bitmend.comparison import compare
    from bitmend.evaluate.generation import generate_text
    from bitmend.formats.compressed_tensors import CompressedTensors

    with pytest.raises(RequestError, match="only language models continue a text"):
        generate_text(vit, "a prompt", tokens=2, temperature=0.0, seed=0, device=torch.device("cpu"))
    with pytest.raises(RequestError, match="a comparison scores models on texts, and the model reads pictures"):
        compare(vit, ["rtn"], [pictures], texts=[tiny_text], output=tmp_path / "compared")
    run(vit, "rtn")
    with pytest.raises(RequestError, match="only causal language models are exported"):
        CompressedTensors().export(tmp_path / "out", tmp_path / "exported")


def test_a_convolution_that_reads_nothing_is_not_rounded(resnet, run, tmp_path, save_for_pictures):
    """A dead ReLU: the layer behind it reads zeros, so that there is no range to be found."""
    model = transformers.AutoModelForImageClassification.from_pretrained(resnet)
    with torch.no_grad():
        norm = model.stages[0][0].norm1
        norm.weight.zero_()
        norm.bias.fill_(-1.0)
    source = save_for_pictures(model, tmp_path / "dead", 8)
    report = run(source, keys={"weights.bits": 4, **STATIC})
    assert [event.where for event in report.events if event.kind == "no_range"] == ["stages.0.0.conv2"]
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert "stages.0.0.conv2" not in loaded.config.quantization_config.manifest.inputs


def test_a_reference_of_other_classes_is_refused(vit, pictures, tmp_path, save_for_pictures):
    model = transformers.AutoModelForImageClassification.from_pretrained(vit)
    model.config.id2label = {0: "dog", 1: "cat", 2: "fish"}
    other = save_for_pictures(model, tmp_path / "other", 8)
    with pytest.raises(RequestError, match="in the same order"):
        bitmend.evaluate([other], images=[pictures], reference=vit)


def test_a_head_that_reads_zeros_is_told(vit, run, tmp_path, save_for_pictures):
    model = transformers.AutoModelForImageClassification.from_pretrained(vit)
    with torch.no_grad():
        model.vit.layernorm.weight.zero_()
        model.vit.layernorm.bias.zero_()
    report = run(save_for_pictures(model, tmp_path / "zeros", 8), "rtn", STATIC)
    assert [(event.kind, event.where, event.degrades) for event in report.events] == [("no_range", "classifier", True)]
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    spec = loaded.config.quantization_config.manifest.inputs["classifier"].activations
    assert (spec.bits, spec.symmetric, spec.ranges) == (8, False, None)
