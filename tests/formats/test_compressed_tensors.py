import importlib.util
import json
from dataclasses import replace

import pytest
import torch
import transformers
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import match_targets
from safetensors.torch import load_file

import bitmend.formats.compressed_tensors as module
from bitmend.errors import CheckpointError, ExportError, RequestError
from bitmend.formats import reopen_child
from bitmend.formats.compressed_tensors import CompressedTensors
from bitmend.formats.ledger import ledger
from bitmend.formats.native_source import open_native
from bitmend.protocols import FORMATS, CheckpointFormat

HALF = torch.bfloat16


def in_blocks(spec):
    return lambda name: spec if ".layers." in name else None


@pytest.fixture
def unchecked(monkeypatch):
    """Leave out the other process, which takes seconds, where it is not the point."""
    monkeypatch.setattr(module, "compare_logits", lambda *args: 0.0)


def unpacked_by_the_library(folder):
    """Every quantised weight, from the file and its config, by compressed-tensors' own code."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    quantization = QuantizationConfig.model_validate(config)
    targets = {target: scheme for scheme in quantization.config_groups.values() for target in scheme.targets}
    tensors = load_file(folder / "model.safetensors")
    weights = {}
    for key in tensors:
        name, _, leaf = key.rpartition(".")
        if leaf == "weight_packed":
            scheme = targets[match_targets(name, torch.nn.Linear(1, 1), targets)[0]]
            parts = {
                other.removeprefix(f"{name}."): tensors[other] for other in tensors if other.startswith(f"{name}.")
            }
            compressor = BaseCompressor.get_value_from_registry(scheme.format)
            weights[name] = compressor.decompress(parts, scheme)["weight"]
    return weights, tensors, config


def test_is_registered():
    assert FORMATS["compressed-tensors"] is CompressedTensors
    assert isinstance(CompressedTensors(), CheckpointFormat)


@pytest.mark.parametrize(
    ("bits", "symmetric"), [(bits, symmetric) for bits in range(1, 9) for symmetric in (True, False)][1:]
)  # without one bit symmetric, which is refused
@pytest.mark.parametrize("group_size", [-1, 0, 16])
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.usefixtures("unchecked")
def test_the_library_unpacks_the_same_weights(quantised, helpers, tmp_path, bits, symmetric, group_size, dtype):
    made = quantised(in_blocks(helpers.spec(bits, symmetric, group_size, scale_dtype=dtype)), dtype=dtype)
    CompressedTensors().export(made.output, tmp_path / "export")
    weights, tensors, config = unpacked_by_the_library(tmp_path / "export")
    assert weights.keys() == made.qtensors.keys()
    for name, qtensor in made.qtensors.items():
        assert torch.equal(weights[name], qtensor.dequantize(dtype))
        assert tensors[f"{name}.weight_shape"].tolist() == list(qtensor.codes.shape)
        assert tensors[f"{name}.weight_scale"].dtype == dtype
        assert (f"{name}.weight_zero_point" in tensors) != symmetric
    assert config["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert config["ignore"] == ["lm_head"]
    account = ledger(tmp_path / "export")
    assert sum(account.bits.values()) == 8 * account.file_bytes
    assert account.bits["codes"] == ledger(made.output).bits["codes"]


def test_a_symmetric_export_is_a_complete_folder_that_transformers_opens(quantised, ids, tmp_path):
    made = quantised(dtype=HALF, scale_dtype=HALF)
    assert CompressedTensors().export(made.output, tmp_path / "export") == ()
    assert {"config.json", "model.safetensors", "tokenizer_config.json", "generation_config.json", "ledger.json"} <= {
        path.name for path in (tmp_path / "export").iterdir()
    }
    model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export", output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, made.dense(ids).logits)


def test_mixed_asymmetric_schemes_with_a_tied_quantised_embedding(quantised, helpers, tmp_path):
    """Everything at once through the other process, which unpacks zero points by the library's own decompressor."""

    def scheme(name):
        if "layers" not in name:
            return helpers.spec(8, True, -1, scale_dtype=HALF)
        return helpers.spec(3, False, 16, scale_dtype=HALF) if "q_proj" in name else helpers.spec(4, scale_dtype=HALF)

    made = quantised(scheme, dtype=HALF, tied=True)
    events = CompressedTensors().export(made.output, tmp_path / "export")
    assert [(event.kind, event.where) for event in events] == [
        ("dequantised", "model.embed_tokens"),
        ("reader_limit", "zero points"),
        ("vllm_fusion", "model.layers.0.self_attn"),
        ("vllm_fusion", "model.layers.1.self_attn"),
    ]
    assert "loads zero points not at all" in events[1].message
    assert "q_proj, k_proj, v_proj of model.layers.0.self_attn have different schemes" in events[2].message
    weights, tensors, config = unpacked_by_the_library(tmp_path / "export")
    groups = config["config_groups"].values()
    assert sorted(len(group["targets"]) for group in groups) == [2, 12]
    assert {group["format"] for group in groups} == {"pack-quantized"}
    table = made.qtensors["model.embed_tokens"].dequantize(HALF)
    assert torch.equal(tensors["model.embed_tokens.weight"], table)
    assert all(torch.equal(weights[name], made.qtensors[name].dequantize(HALF)) for name in weights)


@pytest.mark.usefixtures("unchecked")
def test_zero_points_of_one_scheme_load_in_transformers_when_dequantised(quantised, helpers, ids, tmp_path):
    made = quantised(in_blocks(helpers.spec(4, False, 16)))
    (event,) = CompressedTensors().export(made.output, tmp_path / "export")
    assert "only with CompressedTensorsConfig(dequantize=True)" in event.message
    how = transformers.CompressedTensorsConfig(dequantize=True)
    with pytest.warns(UserWarning, match="You passed `quantization_config`"):
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export", quantization_config=how)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, made.dense(ids).logits)


@pytest.mark.usefixtures("unchecked")
def test_an_untied_quantised_head_is_written_out(quantised, helpers, tmp_path):
    made = quantised(lambda name: helpers.spec(8, True, -1) if name == "lm_head" or "layers" in name else None)
    events = CompressedTensors().export(made.output, tmp_path / "export")
    assert [(event.kind, event.where) for event in events] == [("dequantised", "lm_head")]
    weights, tensors, config = unpacked_by_the_library(tmp_path / "export")
    assert "lm_head" not in weights
    assert torch.equal(tensors["lm_head.weight"], made.qtensors["lm_head"].dequantize())
    assert config["ignore"] == ["lm_head"]


@pytest.mark.usefixtures("unchecked")
def test_scales_wider_than_the_model_are_narrowed_when_that_is_exact(quantised, helpers, tmp_path):
    made = quantised(in_blocks(helpers.spec(4, True, 16, scale_dtype=HALF)), dtype=HALF)
    # The same numbers once more, said to be float32.
    config = json.loads((made.output / "config.json").read_text())
    config["quantization_config"]["schemes"][0]["scale_dtype"] = "float32"
    del config["quantization_config"]["seal"]
    config["quantization_config"]["files"] = {}
    (made.output / "config.json").write_text(json.dumps(config))
    from safetensors.torch import save_file

    path = made.output / "model.safetensors"
    tensors = {name: value.float() if "scale" in name else value for name, value in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})
    CompressedTensors().export(made.output, tmp_path / "export")
    weights, tensors, _ = unpacked_by_the_library(tmp_path / "export")
    assert all(torch.equal(weights[name], made.qtensors[name].dequantize(HALF)) for name in weights)
    assert tensors["model.layers.0.mlp.up_proj.weight_scale"].dtype == HALF


# ---------------------------------------------------------------------------------------------- refusals
def refused(made, tmp_path, message):
    with pytest.raises(RequestError, match=message):
        CompressedTensors().export(made.output, tmp_path / "export")
    assert not list(tmp_path.glob("export*"))


def test_what_the_format_cannot_hold(quantised, helpers, tmp_path):
    refused(quantised(in_blocks(helpers.spec(1, True))), tmp_path, "has the one-bit grid -scale, .scale, which")


def test_conv1d_is_refused(quantised, tmp_path):
    refused(quantised(family="gpt2"), tmp_path, "is a Conv1D of GPT-2, which compressed-tensors cannot hold")


@pytest.mark.parametrize("kind", ["conv2d", "grouped_conv2d"])
def test_convolutions_are_refused(quantised, tmp_path, monkeypatch, kind):
    made = quantised()

    def opened(folder, target):
        source = open_native(folder, target)
        return replace(source, exported={name: replace(entry, kind=kind) for name, entry in source.exported.items()})

    monkeypatch.setattr(module, "open_native", opened)
    refused(made, tmp_path, "is a convolution, but an export to compressed-tensors holds")


def test_a_shorter_last_group_is_refused(quantised, helpers, tmp_path):
    made = quantised(in_blocks(helpers.spec(4, True, 20, ragged=True)))
    refused(made, tmp_path, "has 32 input channels in groups of 20; .* use a|a shorter last group")


def test_scales_that_readers_would_round_are_refused(quantised, helpers, tmp_path):
    made = quantised(in_blocks(helpers.spec(3, False, 16, scale_dtype=torch.float32)), dtype=HALF)
    refused(made, tmp_path, r"has scales in torch\.float32 that change when cast to torch\.bfloat16, the model's dtype")


def test_nothing_to_export(quantised, helpers, saved, tmp_path):
    made = quantised(lambda name: helpers.spec(8, True, -1) if name == "lm_head" else None)
    refused(made, tmp_path, "has no quantised layer that compressed-tensors could hold")
    with pytest.raises(RequestError, match="is not in bitmend's own format"):
        CompressedTensors().export(saved("gpt2"), tmp_path / "export")


def test_models_that_are_no_language_models(quantised, tmp_path):
    made = quantised()
    config = transformers.ViTConfig(hidden_size=8, num_attention_heads=2).to_dict()
    old = json.loads((made.output / "config.json").read_text())
    config["quantization_config"] = old["quantization_config"]
    (made.output / "config.json").write_text(json.dumps(config))
    refused(made, tmp_path, "only causal language models are exported to compressed-tensors; .* is ViTConfig")


def test_the_package_is_needed(quantised, tmp_path, monkeypatch):
    made = quantised()
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "compressed_tensors" else find(name))
    refused(made, tmp_path, r"is not installed; run: pip install 'bitmend\[export\]'")


def test_an_altered_source_is_refused(quantised, tmp_path):
    made = quantised()
    path = made.output / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="sha256 differs"):
        CompressedTensors().export(made.output, tmp_path / "export")


@pytest.mark.usefixtures("unchecked")
def test_an_existing_output_needs_overwrite(quantised, tmp_path):
    made = quantised()
    CompressedTensors().export(made.output, tmp_path / "export")
    with pytest.raises(RequestError, match="--overwrite"):
        CompressedTensors().export(made.output, tmp_path / "export")
    CompressedTensors(overwrite=True).export(made.output, tmp_path / "export")


def test_an_export_that_gives_other_logits_is_removed(quantised, tmp_path, monkeypatch):
    """The classic mistake: zero points (here: codes) in another convention load fine and speak gibberish."""
    made = quantised()
    right = module._module_tensors

    def wrong(name, packed, dtype):
        tensors = right(name, packed, dtype)
        tensors[f"{name}.weight_packed"] = tensors[f"{name}.weight_packed"] ^ 0x11111111
        return tensors

    monkeypatch.setattr(module, "_module_tensors", wrong)
    with pytest.raises(
        ExportError, match=r"the export gives other logits than .*: relative difference .*; it was removed"
    ):
        CompressedTensors().export(made.output, tmp_path / "export")
    assert not list(tmp_path.glob("export*"))


# ------------------------------------------------------------------------------------------------ experts
EXPERT = "model.layers.0.block_sparse_moe.experts"


def test_experts_of_one_scheme_go_through_transformers_own_reader(quantised, helpers, tmp_path, monkeypatch):
    ways = []
    original = module.compare_logits
    monkeypatch.setattr(
        module,
        "compare_logits",
        lambda source, folder, dtype: (
            ways.append(reopen_child.way_of_opening(str(folder))) or original(source, folder, dtype)
        ),
    )
    made = quantised(family="mixtral", dtype=HALF, scale_dtype=HALF)
    (event,) = CompressedTensors().export(made.output, tmp_path / "export")
    assert (event.kind, event.where) == ("reader_limit", "experts")
    assert event.message.endswith(
        "loads a mixture of experts like this one only with CompressedTensorsConfig(dequantize=True)"
    )
    assert ways == [reopen_child.open_dequantised]
    _, tensors, config = unpacked_by_the_library(tmp_path / "export")
    assert {f"{EXPERT}.2.{leaf}.weight_packed" for leaf in ("w1", "w2", "w3")} <= tensors.keys()
    assert config["ignore"] == ["lm_head", *(f"model.layers.{n}.block_sparse_moe.gate" for n in (0, 1))]
    assert ledger(tmp_path / "export").bits["codes"] == ledger(made.output).bits["codes"]


@pytest.mark.parametrize(
    "change", ["zero points", *(pytest.param(one, marks=pytest.mark.slow) for one in ("another scheme", "unquantised"))]
)
def test_other_experts_go_through_the_decompressor(quantised, helpers, tmp_path, change):
    spec = helpers.spec(4, change != "zero points", 16, scale_dtype=HALF)
    other = {"another scheme": helpers.spec(8, True, 16, scale_dtype=HALF), "unquantised": None}.get(change, spec)

    def scheme(name):
        return None if ".layers." not in name else other if ".experts.1." in name else spec

    made = quantised(scheme, "mixtral", HALF)
    events = CompressedTensors().export(made.output, tmp_path / "export")
    assert "like this one not at all" in events[0].message
    assert reopen_child.way_of_opening(str(tmp_path / "export")) is reopen_child.open_experts_by_decompressor
    fused = [event.where for event in events if event.kind == "vllm_fusion"]
    assert fused == ([] if change == "zero points" else [f"model.layers.{n}.mlp.experts" for n in (0, 1)])


def test_experts_that_were_altered_are_found_out(quantised, helpers, tmp_path, monkeypatch):
    original = module._module_tensors

    def altered(name, packed, dtype):
        tensors = original(name, packed, dtype)
        if name == f"{EXPERT}.0.w1":
            tensors[f"{name}.weight_scale"] = tensors[f"{name}.weight_scale"] * 40
        return tensors

    monkeypatch.setattr(module, "_module_tensors", altered)
    made = quantised(family="mixtral", dtype=HALF, scale_dtype=HALF)
    with pytest.raises(ExportError, match="the export gives other logits"):
        CompressedTensors().export(made.output, tmp_path / "export")
    assert not (tmp_path / "export").exists()
