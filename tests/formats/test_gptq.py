import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import bitmend.formats.gptq as module
from bitmend.errors import CheckpointError, ExportError, RequestError
from bitmend.formats.gptq import GptqFormat
from bitmend.formats.ledger import ledger
from bitmend.formats.native_source import open_native
from bitmend.formats.quantized_folder import read_quantized
from bitmend.formats.read_gptq import gptq_config, gptq_layers
from bitmend.formats.safetensors_file import TensorRecord
from bitmend.numerics.qtensor import QParams, QTensor
from bitmend.protocols import FORMATS, CheckpointFormat
from bitmend.runtime.packed import pack

HALF = torch.float16


def in_blocks(spec):
    return lambda name: spec if ".layers." in name else None


def wide(saved):
    """A model whose every layer has sides that are multiples of 32, which 3 bits need."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = saved("llama", HALF)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, attention_bias=True,
    )  # fmt: skip
    LlamaForCausalLM(config).to(HALF).save_pretrained(folder)
    return folder


def test_is_registered():
    assert FORMATS["gptq"] is GptqFormat
    assert isinstance(GptqFormat(), CheckpointFormat)


# ---------------------------------------------------------------------------------------------- the law
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    symmetric=st.booleans(),
    rows=st.integers(1, 3),
    columns=st.integers(1, 4),
    groups=st.sampled_from([1, 2, 4]),
    granularity=st.sampled_from(["tensor", "channel", "group"]),
    scale_dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    seed=st.integers(0, 10_000),
)
def test_what_is_read_is_what_was_written(
    helpers, bits, symmetric, rows, columns, groups, granularity, scale_dtype, seed
):
    """Random codes, zero points and scales: the words of GPTQ, read by the reader, give the same dense weights."""
    out, width = 32 * rows, 32 * columns
    size = {"tensor": 0, "channel": -1, "group": width // groups}[granularity]
    generator = torch.Generator().manual_seed(seed)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    spec = helpers.spec(bits, symmetric, size, scale_dtype=scale_dtype)
    shape = (1 if size == 0 else out, groups if size > 0 else 1)
    scale = (torch.rand(shape, generator=generator) + 0.01).half().to(scale_dtype).float()
    zero_point = None if symmetric else torch.randint(low + 1, high, shape, generator=generator).float()
    codes = torch.randint(low, high, (out, width), generator=generator).to(torch.int8)
    qtensor = QTensor(codes, QParams(scale, zero_point), spec)
    tensors = module._module_tensors("m", pack(qtensor))
    config = {"bits": bits, "group_size": size or -1, "sym": symmetric, "desc_act": False, "checkpoint_format": "gptq"}
    records = {name: TensorRecord(tensor.dtype, tuple(tensor.shape), 0, 0) for name, tensor in tensors.items()}
    layer = gptq_layers(records, gptq_config(config))["m"]
    assert (layer.bits, layer.shape) == (bits, (out, width))
    assert torch.equal(layer.read(tensors).dense(), qtensor.dequantize())


# ---------------------------------------------------------------------------------------------- whole folders
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [-1, 0, 32])
def test_a_symmetric_export(helpers, saved, tmp_path, bits, group_size):
    scheme = helpers.spec(bits, True, group_size, scale_dtype=HALF)
    made = helpers.quantise(wide(saved), tmp_path / "native", in_blocks(scheme))
    assert GptqFormat().export(made.output, tmp_path / "export") == ()
    assert {"config.json", "model.safetensors", "tokenizer_config.json", "quantize_config.json", "ledger.json"} <= {
        path.name for path in (tmp_path / "export").iterdir()
    }
    config = json.loads((tmp_path / "export" / "config.json").read_text())["quantization_config"]
    assert config == json.loads((tmp_path / "export" / "quantize_config.json").read_text())
    assert config.pop("meta")["quantizer"][0].startswith("bitmend:")
    assert config == {
        "quant_method": "gptq", "bits": bits, "group_size": group_size or -1, "sym": True, "desc_act": False,
        "lm_head": False, "checkpoint_format": "gptq", "pack_dtype": "int32",
    }  # fmt: skip
    checkpoint = read_quantized(tmp_path / "export")
    assert (checkpoint.format, checkpoint.events) == ("gptq", ())
    state, dense = dict(read_quantized(tmp_path / "export", HALF)), made.dense.state_dict()
    assert state.keys() == dense.keys()
    assert all(torch.equal(state[name], dense[name]) for name in dense)
    tensors = load_file(tmp_path / "export" / "model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    groups = 3 if group_size == 32 else 1
    found = {leaf: tensors[f"{name}.{leaf}"] for leaf in ("qweight", "qzeros", "scales", "g_idx")}
    assert {leaf: (tensor.dtype, tuple(tensor.shape)) for leaf, tensor in found.items()} == {
        "qweight": (torch.int32, (96 * bits // 32, 64)),
        "qzeros": (torch.int32, (groups, 64 * bits // 32)),
        "scales": (HALF, (groups, 64)),
        "g_idx": (torch.int32, (96,)),
    }
    assert torch.equal(found["g_idx"], torch.arange(96, dtype=torch.int32) // (96 // groups))
    if bits == 4:
        assert set(found["qzeros"].flatten().tolist()) == {0x77777777}


def test_one_layer_by_hand(helpers):
    """Codes -8 .. 7 and zero points -7 (stored as 0) and 7 (stored as 14), four bits each, lowest first."""
    codes = torch.arange(-8, 0, dtype=torch.int8).expand(8, 8).contiguous()
    zero_point = torch.tensor([-7.0, 7.0] * 4)[:, None]
    spec = helpers.spec(4, False, -1, scale_dtype=HALF)
    tensors = module._module_tensors("m", pack(QTensor(codes, QParams(torch.ones(8, 1), zero_point), spec)))
    assert tensors["m.qweight"].tolist() == [[0x76543210] * 8]
    assert [word & 0xFFFFFFFF for word in tensors["m.qzeros"][0].tolist()] == [0xE0E0E0E0]
    assert tensors["m.g_idx"].tolist() == [0] * 8


def test_scales_that_float16_rounds_are_an_event(quantised, helpers, tmp_path):
    made = quantised(in_blocks(helpers.spec(4, True, 16)))
    (event,) = GptqFormat().export(made.output, tmp_path / "export")
    assert event.kind == "scales_rounded"
    assert event.message.startswith("scales of 14 of 14 layers were rounded to float16")
    checkpoint = read_quantized(tmp_path / "export")
    for name, qtensor in made.qtensors.items():
        change = (checkpoint.dense(name) - qtensor.dequantize()).abs() / qtensor.dequantize().abs().clamp(min=1e-30)
        assert change.max() <= float(event.message.rpartition("at most ")[2].partition(" ")[0]) * 1.1


def test_mixed_schemes_and_unquantised_layers_are_told_apart(quantised, helpers, tmp_path):
    def scheme(name):
        if "layers" not in name:
            return helpers.spec(8, True, -1, scale_dtype=HALF)
        if "1.self_attn.q_proj" in name:
            return None
        return helpers.spec(8 if "down_proj" in name else 4, True, 16, scale_dtype=HALF)

    made = quantised(scheme, dtype=HALF, tied=True)
    events = GptqFormat().export(made.output, tmp_path / "export")
    assert [(event.kind, event.where) for event in events] == [
        ("dequantised", "model.embed_tokens"),
        ("reader_limit", "dynamic"),
        ("vllm_fusion", "model.layers.1.self_attn"),
    ]
    config = json.loads((tmp_path / "export" / "config.json").read_text())["quantization_config"]
    eight = {"bits": 8, "group_size": 16, "sym": True}
    assert (config["bits"], config["group_size"]) == (4, 16)
    assert config["dynamic"] == {
        r"+:^model\.layers\.0\.mlp\.down_proj$": eight,
        r"+:^model\.layers\.1\.mlp\.down_proj$": eight,
        r"-:^model\.layers\.1\.self_attn\.q_proj$": {},
    }
    state, dense = dict(read_quantized(tmp_path / "export", HALF)), made.dense.state_dict()
    assert state.keys() == dense.keys() - {"lm_head.weight"}
    assert all(torch.equal(state[name], dense[name]) for name in state)


def test_asymmetric_layers_that_version_one_can_hold(quantised, helpers, tmp_path):
    made = quantised(in_blocks(helpers.spec(4, False, 16, scale_dtype=HALF)), dtype=HALF)
    events = GptqFormat().export(made.output, tmp_path / "export")
    assert [(event.kind, event.where) for event in events] == [("reader_limit", "zero points")]
    state, dense = dict(read_quantized(tmp_path / "export", HALF)), made.dense.state_dict()
    assert all(torch.equal(state[name], dense[name]) for name in dense)


def test_group_sizes_that_gptqmodel_refuses_are_an_event(quantised, helpers, tmp_path):
    made = quantised(in_blocks(helpers.spec(4, True, 8, scale_dtype=HALF)), dtype=HALF)
    (event,) = GptqFormat().export(made.output, tmp_path / "export")
    assert event.message == "GPTQModel 7.6 reads groups of 16, 32, 64, 128, 256, 512, 1024 or -1; these have 8"


def test_the_ledger_of_an_export_books_every_bit(quantised, helpers, tmp_path):
    made = quantised(in_blocks(helpers.spec(4, True, 16, scale_dtype=HALF)), dtype=HALF)
    GptqFormat().export(made.output, tmp_path / "export")
    account, native = ledger(tmp_path / "export"), ledger(made.output)
    assert account.to_json() == json.loads((tmp_path / "export" / "ledger.json").read_text())
    assert account.format == "gptq"
    assert sum(account.bits.values()) == 8 * account.file_bytes
    assert account.parameters == native.parameters
    for category in ("codes", "scales"):
        assert account.bits[category] == native.bits[category]
    weights = account.quantised_weights
    assert account.bits["zero_points"] == 4 * weights // 16
    assert account.bits["indices"] == 32 * sum(qtensor.codes.shape[1] for qtensor in made.qtensors.values())


# ---------------------------------------------------------------------------------------------- refusals
def refused(made, tmp_path, message):
    with pytest.raises(RequestError, match=message):
        GptqFormat().export(made.output, tmp_path / "export")
    assert not list(tmp_path.glob("export*"))


def test_widths_that_the_format_does_not_know(quantised, helpers, tmp_path):
    refused(quantised(in_blocks(helpers.spec(5))), tmp_path, "has 5 bits, but GPTQ holds 2, 3, 4 or 8; quantise with")


def test_sides_that_do_not_fill_words(quantised, helpers, tmp_path):
    message = r"k_proj has 16 output and 32 input channels, but at 3 bits GPTQ needs multiples of 32"
    refused(quantised(in_blocks(helpers.spec(3))), tmp_path, message)


def test_conv1d(quantised, tmp_path):
    refused(quantised(family="gpt2"), tmp_path, "is a Conv1D of GPT-2, which bitmend does not write as GPTQ")


@pytest.mark.parametrize("kind", ["conv2d", "grouped_conv2d"])
def test_convolutions_are_refused(quantised, tmp_path, monkeypatch, kind):
    made = quantised()

    def opened(folder, target):
        source = open_native(folder, target)
        return replace(source, exported={name: replace(entry, kind=kind) for name, entry in source.exported.items()})

    monkeypatch.setattr(module, "open_native", opened)
    refused(made, tmp_path, "is a convolution, but GPTQ holds linear layers only")


def test_a_shorter_last_group(quantised, helpers, tmp_path):
    made = quantised(in_blocks(helpers.spec(4, True, 20, ragged=True)))
    refused(made, tmp_path, "has 32 input channels in groups of 20; readers of GPTQ do not expect a shorter last group")


def native_with_scales(quantised, helpers, factor):
    """A checkpoint whose scales are multiplied after the fact."""
    made = quantised(in_blocks(helpers.spec(4, True, 16)))
    path = made.output / "model.safetensors"
    tensors = load_file(path)
    tensors = {name: value * factor if "scale" in name else value for name, value in tensors.items()}
    save_file(tensors, path, {"format": "pt"})
    config = json.loads((made.output / "config.json").read_text())
    config["quantization_config"]["files"] = {}
    (made.output / "config.json").write_text(json.dumps(config))
    return made


@pytest.mark.parametrize("factor", [1e8, 1e-6, 1e-20, float("nan")])
def test_scales_that_float16_cannot_hold(quantised, helpers, tmp_path, factor):
    made = native_with_scales(quantised, helpers, factor)
    refused(made, tmp_path, "has scales from .* to .*, which float16, the type of GPTQ's scales, changes by up to")


def test_zero_points_that_version_one_cannot_hold(quantised, helpers, tmp_path):
    source = quantised(in_blocks(helpers.spec(4, False, 16, scale_dtype=HALF)), dtype=HALF)
    name = "model.layers.1.mlp.up_proj"
    path = source.output / "model.safetensors"
    tensors = load_file(path)
    tensors[f"{name}.weight_zero_point"][0, 0] &= ~0xF  # the code -8 of output 0
    save_file(tensors, path, {"format": "pt"})
    config = json.loads((source.output / "config.json").read_text())
    config["quantization_config"]["files"] = {}
    (source.output / "config.json").write_text(json.dumps(config))
    refused(source, tmp_path, f"{name} has zero points at the lower end of the range, which GPTQ version 1")


def test_an_altered_source(quantised, tmp_path):
    made = quantised()
    path = made.output / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="sha256 differs"):
        GptqFormat().export(made.output, tmp_path / "export")


def test_an_existing_output_needs_overwrite(quantised, tmp_path):
    made = quantised()
    GptqFormat().export(made.output, tmp_path / "export")
    with pytest.raises(RequestError, match="--overwrite"):
        GptqFormat().export(made.output, tmp_path / "export")
    GptqFormat(overwrite=True).export(made.output, tmp_path / "export")


# ---------------------------------------------------------------------------------------------- the proof
def damaged(monkeypatch, leaf, change):
    right = module._module_tensors

    def wrong(name, packed):
        tensors = right(name, packed)
        return tensors | {f"{name}.{leaf}": change(tensors[f"{name}.{leaf}"])}

    monkeypatch.setattr(module, "_module_tensors", wrong)


@pytest.mark.parametrize(
    ("leaf", "change", "message"),
    [
        ("qweight", lambda words: words ^ 1, "read back, the weight of .* is not that of the source; .* was removed"),
        ("scales", lambda scale: scale * 2, "read back, the weight of .* is not that of the source"),
        ("g_idx", lambda group: group.flip(0), "read back, the weight of .* is not that of the source"),
        ("qzeros", lambda words: words + 0x11111111, "read back, the export is of format gptq_v2, not gptq"),
    ],
)
def test_an_export_that_is_not_its_source_is_removed(quantised, tmp_path, monkeypatch, leaf, change, message):
    made = quantised()
    damaged(monkeypatch, leaf, change)
    with pytest.raises(ExportError, match=message):
        GptqFormat().export(made.output, tmp_path / "export")
    assert not list(tmp_path.glob("export*"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda name, value: {name: value + 1}, r"read back, model\.norm\.weight is not that of the source"),
        (lambda name, value: {}, r"read back, model\.norm\.weight is not that of the source"),
        (lambda name, value: {name: value, "stray": value.clone()}, "read back, the export also holds stray"),
    ],
)
def test_other_tensors_are_compared_too(quantised, tmp_path, monkeypatch, change, message):
    made = quantised()
    right = module._pieces

    def wrong(checkpoint):
        for piece in right(checkpoint):
            norm = piece.pop("model.norm.weight", None)
            yield piece if norm is None else change("model.norm.weight", norm)

    monkeypatch.setattr(module, "_pieces", wrong)
    with pytest.raises(ExportError, match=message):
        GptqFormat().export(made.output, tmp_path / "export")
    assert not list(tmp_path.glob("export*"))


# ---------------------------------------------------------------------------------------------- experts
def test_experts_are_written_one_by_one_under_their_own_names(quantised, helpers, tmp_path):
    spec, other = (helpers.spec(bits, True, 16, scale_dtype=HALF) for bits in (4, 8))

    def scheme(name):
        return None if ".layers." not in name else other if ".experts.1." in name else spec

    made = quantised(scheme, "mixtral", HALF)
    events = GptqFormat().export(made.output, tmp_path / "export")
    assert [event.kind for event in events] == ["reader_limit", "vllm_fusion", "vllm_fusion"]
    export = read_quantized(tmp_path / "export")
    name = "layers.1.{}.experts.1.w3"
    inside, outside = (f"model.{name.format(part)}" for part in ("mlp", "block_sparse_moe"))
    assert torch.equal(export.dense(outside), made.qtensors[inside].dequantize())
    assert export.layers.keys() == {one.replace(".mlp.", ".block_sparse_moe.") for one in made.qtensors}
    dynamic = json.loads((tmp_path / "export" / "config.json").read_text())["quantization_config"]["dynamic"]
    assert "-:^model\\.layers\\.0\\.block_sparse_moe\\.gate$" in dynamic
    assert dynamic[f"+:^{outside}$".replace(".", "\\.")] == {"bits": 8, "group_size": 16, "sym": True}
