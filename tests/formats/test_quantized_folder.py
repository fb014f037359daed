import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import bitmend.formats
from bitmend.errors import CheckpointError
from bitmend.formats.compressed_tensors import CompressedTensors
from bitmend.formats.gptq import GptqFormat
from bitmend.formats.quantized_folder import read_quantized

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 8, "sym": True, "desc_act": False, "checkpoint_format": "gptq"}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 8, "zero_point": True, "version": "gemm"}


def gptq_tensors(**changes):
    tensors = {
        "a.norm.weight": torch.ones(8),
        "a.proj.bias": torch.arange(8.0),
        "a.proj.qweight": torch.full((2, 8), 0x11111111, dtype=torch.int32) * 9,
        "a.proj.qzeros": torch.full((2, 1), 0x77777777, dtype=torch.int32),
        "a.proj.scales": torch.full((2, 8), 0.5, dtype=torch.float16),
        "a.proj.g_idx": torch.arange(16, dtype=torch.int32) // 8,
    }
    return {name: value for name, value in {**tensors, **changes}.items() if value is not None}


@pytest.fixture
def folder(tmp_path):
    """Return a function that writes a folder by hand."""

    def write(config=GPTQ, tensors=None, name="folder"):
        path = tmp_path / name
        path.mkdir()
        (path / "config.json").write_text(json.dumps({"quantization_config": config} if config else {}))
        save_file(gptq_tensors() if tensors is None else tensors, path / "model.safetensors")
        return path

    return write


def test_a_gptq_folder_is_a_state_dict_one_tensor_at_a_time(folder):
    checkpoint = read_quantized(folder())
    assert (checkpoint.format, checkpoint.events) == ("gptq", ())
    assert {name: (layer.bits, layer.shape) for name, layer in checkpoint.layers.items()} == {"a.proj": (4, (8, 16))}
    state = dict(checkpoint)
    assert state.keys() == {"a.norm.weight", "a.proj.bias", "a.proj.weight"}
    assert torch.equal(state["a.proj.weight"], torch.full((8, 16), 0.5))
    assert torch.equal(state["a.proj.bias"], torch.arange(8.0))
    assert set(checkpoint.unquantised) == {"a.norm.weight", "a.proj.bias"}
    assert torch.equal(checkpoint.stored("a.norm.weight"), torch.ones(8))


def test_the_dtype_is_that_of_dense_weights_only(folder):
    state = dict(bitmend.formats.read_quantized(str(folder()), torch.bfloat16))
    assert state["a.proj.weight"].dtype == torch.bfloat16
    assert state["a.norm.weight"].dtype == torch.float32


def test_only_the_asked_layer_is_read(folder, monkeypatch):
    tensors = gptq_tensors()
    second = {name.replace("a.", "b."): value.clone() for name, value in tensors.items()}
    checkpoint = read_quantized(folder(tensors=tensors | second))
    read = []
    original = type(checkpoint._tensors).__getitem__
    monkeypatch.setattr(
        type(checkpoint._tensors), "__getitem__", lambda self, name: read.append(name) or original(self, name)
    )
    iterator = iter(checkpoint)
    found = next(name for name, _ in iterator if name.endswith("proj.weight"))
    other = "b." if found.startswith("a.") else "a."
    assert not any(name.startswith(f"{other}proj.q") for name in read)


def test_version_two_and_silence(folder):
    silent = {key: value for key, value in GPTQ.items() if key != "checkpoint_format"}
    tensors = gptq_tensors(**{"a.proj.qzeros": torch.full((2, 1), -0x77777778, dtype=torch.int32)})  # 0x88888888
    second = read_quantized(folder(GPTQ | {"checkpoint_format": "gptq_v2"}, tensors, "second"))
    assert (second.format, second.events) == ("gptq_v2", ())
    guessed = read_quantized(folder(silent, tensors, "silent"))
    assert (guessed.format, [event.kind for event in guessed.events]) == ("gptq_v2", ["zero_points_guessed"])
    wrong = read_quantized(folder(GPTQ, tensors, "wrong"))
    assert (wrong.format, [event.kind for event in wrong.events]) == ("gptq_v2", ["zero_points_contradict"])
    for checkpoint in (second, guessed, wrong):
        assert torch.equal(checkpoint.dense("a.proj"), torch.full((8, 16), 0.5))


def test_activation_order_that_config_denies_is_used_and_said(folder):
    ordered = gptq_tensors(
        **{
            "a.proj.g_idx": torch.tensor([1, 0] * 8, dtype=torch.int32),
            "a.proj.scales": torch.tensor([[0.5] * 8, [2.0] * 8], dtype=torch.float16),
        }
    )
    denied = read_quantized(folder(GPTQ, ordered, "denied"))
    assert [event.kind for event in denied.events] == ["groups_contradict"]
    assert denied.dense("a.proj")[0].tolist() == [2.0, 0.5] * 8
    assert read_quantized(folder(GPTQ | {"desc_act": True}, ordered, "said")).events == ()


def test_the_old_config_file(folder):
    path = folder(None)
    with pytest.raises(CheckpointError, match=r"its config\.json has no quantization_config; give a quantised one"):
        read_quantized(path)
    old = {"bits": 4, "group_size": 8, "sym": True, "desc_act": False}
    (path / "quantize_config.json").write_text(json.dumps(old))
    checkpoint = read_quantized(path)
    assert [event.kind for event in checkpoint.events] == ["zero_points_guessed"]
    assert torch.equal(checkpoint.dense("a.proj"), torch.full((8, 16), 0.5))
    (path / "quantize_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"quantize_config\.json must be a JSON table"):
        read_quantized(path)


def test_an_awq_folder(folder):
    tensors = {
        "a.proj.qweight": torch.full((16, 1), 0x33333333, dtype=torch.int32),
        "a.proj.qzeros": torch.full((2, 1), 0x11111111, dtype=torch.int32),
        "a.proj.scales": torch.full((2, 8), 0.5, dtype=torch.float16),
        "a.norm.weight": torch.ones(8),
    }
    checkpoint = read_quantized(folder(AWQ, tensors))
    assert (checkpoint.format, checkpoint.events) == ("awq", ())
    state = dict(checkpoint)
    assert state.keys() == {"a.proj.weight", "a.norm.weight"}
    assert torch.equal(state["a.proj.weight"], torch.ones(8, 16))


@pytest.mark.parametrize(("bits", "symmetric", "group_size"), [(3, False, 16), (4, True, -1), (8, True, 0)])
def test_our_own_compressed_tensors_export(quantised, helpers, tmp_path, monkeypatch, bits, symmetric, group_size):
    monkeypatch.setattr("bitmend.formats.compressed_tensors.compare_logits", lambda *args: 0.0)
    scheme = helpers.spec(bits, symmetric, group_size)
    made = quantised(lambda name: scheme if ".layers." in name else None)
    CompressedTensors().export(made.output, tmp_path / "export")
    checkpoint = read_quantized(tmp_path / "export")
    assert (checkpoint.format, checkpoint.events) == ("compressed-tensors", ())
    state = dict(checkpoint)
    dense = made.dense.state_dict()
    assert state.keys() == dense.keys()
    assert all(torch.equal(state[name], dense[name]) for name in dense)


def test_rounded_activations_are_an_event(quantised, tmp_path, monkeypatch):
    monkeypatch.setattr("bitmend.formats.compressed_tensors.compare_logits", lambda *args: 0.0)
    CompressedTensors().export(quantised().output, tmp_path / "export")
    path = tmp_path / "export" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8}
    path.write_text(json.dumps(config))
    assert [event.kind for event in read_quantized(tmp_path / "export").events] == ["activations_ignored"]


# ---------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (
            {"quant_method": "bitsandbytes"},
            "quant_method must be gptq, awq or compressed-tensors .*; got 'bitsandbytes'",
        ),
        ({"bits": 4}, "quant_method must be gptq, awq or compressed-tensors .*; got None"),
        ({"quant_method": "bitmend"}, "is in bitmend's own format; open it with bitmend.load"),
        (["gptq"], r"has no quantization_config; give a quantised one"),
        (GPTQ | {"bits": 3}, "do not belong to codes of 3 bits"),
        (AWQ, r"a\.proj has 2 input channels, which group_size 8 does not divide"),
    ],
)
def test_configs_that_are_refused(folder, config, sentence):
    with pytest.raises(CheckpointError, match=sentence):
        read_quantized(folder(config))


@pytest.mark.parametrize("bad", [-1, 2, 2**31 - 1, -(2**31)])
def test_groups_out_of_range_are_refused_at_once(folder, bad):
    group = torch.arange(16, dtype=torch.int32) // 8
    group[5] = bad
    with pytest.raises(CheckpointError, match=r"a\.proj\.g_idx must hold numbers from 0 to 1, one of the groups"):
        read_quantized(folder(tensors=gptq_tensors(**{"a.proj.g_idx": group})))


def test_scales_that_are_no_numbers_are_refused_when_read(folder):
    scales = torch.full((2, 8), float("nan"), dtype=torch.float16)
    checkpoint = read_quantized(folder(tensors=gptq_tensors(**{"a.proj.scales": scales})))
    with pytest.raises(CheckpointError, match=r"a\.proj\.scales must hold finite scales"):
        list(checkpoint)


def test_an_index_that_leads_out_of_the_folder(folder, tmp_path):
    path = folder()
    (path / "model.safetensors").rename(tmp_path / "outside.safetensors")
    for name in ("../outside.safetensors", str(tmp_path / "outside.safetensors")):
        index = {"weight_map": dict.fromkeys(gptq_tensors(), name)}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match=r"names the weight file 'outside\.safetensors', which is not in"):
            read_quantized(path)


def test_a_file_that_is_cut_short(folder):
    path = folder() / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="it is cut short or altered"):
        read_quantized(path.parent)


def test_a_header_with_a_negative_or_huge_size(folder):
    path = folder() / "model.safetensors"
    good = path.read_bytes()
    for size, sentence in ((b"-8]", "has an impossible shape"), (b"888888888888888]", "bytes, but")):
        length = int.from_bytes(good[:8], "little")
        header = good[8 : 8 + length].replace(
            b'"shape":[2,8],"data_offsets"', b'"shape":[2,' + size + b',"data_offsets"'
        )
        path.write_bytes(len(header).to_bytes(8, "little") + header + good[8 + length :])
        with pytest.raises(CheckpointError, match=sentence):
            read_quantized(path.parent)


def test_shards_are_read_through_their_index(quantised, helpers, tmp_path):
    made = quantised(lambda name: helpers.spec(4, True, 16) if ".layers." in name else None, dtype=torch.float16)
    GptqFormat().export(made.output, tmp_path / "export")
    path = tmp_path / "export" / "model.safetensors"
    tensors = load_file(path)
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2])):  # parts of a layer in different files
        save_file({name: tensors[name] for name in part}, path.with_name(f"{number}.safetensors"))
        weight_map |= dict.fromkeys(part, f"{number}.safetensors")
    path.unlink()
    path.with_name("model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    checkpoint = read_quantized(tmp_path / "export")
    for name in checkpoint.layers:
        packed = made.qtensors[name]
        scale = packed.qparams.scale.half().float().repeat_interleave(16, 1)
        assert torch.equal(checkpoint.dense(name), packed.codes.float() * scale)
