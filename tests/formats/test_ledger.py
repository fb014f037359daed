import json

import pytest
import torch
from safetensors.torch import save_file

from bitmend.errors import CheckpointError
from bitmend.formats.ledger import CATEGORIES, QUANTISED, ledger
from bitmend.formats.native import ManifestEntry, quantization_config, site_tensors


def file_bytes(folder):
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def row(account, name):
    return next(row for row in account.rows if row.name == name)


@pytest.mark.parametrize("bits", [1, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [-1, 0, 16])
def test_every_bit_of_the_files_is_booked_once(quantised, helpers, bits, symmetric, group_size):
    made = quantised(lambda name: helpers.spec(bits, symmetric, group_size) if ".layers." in name else None)
    account = ledger(made.output)
    assert set(account.bits) == set(CATEGORIES)
    assert sum(account.bits.values()) == 8 * account.file_bytes == 8 * file_bytes(made.output)
    assert sum(sum(row.bits.values()) for row in account.rows) + account.bits["header"] == 8 * account.file_bytes
    weights = sum(qtensor.codes.numel() for qtensor in made.qtensors.values())
    assert account.quantised_weights == weights
    assert account.bits["codes"] == weights * bits
    assert account.parameters == sum(parameter.numel() for parameter in made.dense.parameters())
    assert (account.bits["zero_points"] == 0) == symmetric


def test_a_case_by_hand(quantised, helpers):
    """k_proj is 16 x 32: 3-bit codes fill 3 words a row; 2 bf16 scales a row; 2 x 16 zero points of 3 bits, 2 words each."""
    spec = helpers.spec(3, False, 16, scale_dtype=torch.bfloat16)
    account = ledger(quantised(lambda name: spec if "k_proj" in name else None).output)
    found = row(account, "model.layers.1.self_attn.k_proj")
    assert found.bits == {
        "codes": 16 * 32 * 3, "scales": 16 * 2 * 16, "zero_points": 16 * 2 * 3, "padding": 2 * 2 * 32 - 16 * 2 * 3,
        "biases": 16 * 32,
    }  # fmt: skip
    assert (found.weights, found.code_bits) == (16 * 32, 3)
    assert found.bits_per_weight == account.bits_per_weight == (512 * 3 + 512 + 128) / 512
    assert account.bits_per_weight_model == (8 * account.file_bytes - account.bits["header"]) / account.parameters


def test_padding_is_a_line_of_its_own(quantised, helpers):
    account = ledger(quantised(lambda name: helpers.spec(3, True, -1) if "down_proj" in name else None).output)
    found = row(account, "model.layers.0.mlp.down_proj")  # 48 columns x 3 bits = 144, in 5 words of 32
    assert found.bits["padding"] == 32 * (160 - 144)


def test_four_bits_in_groups_of_128_with_half_precision_scales_take_an_eighth_more(quantised, helpers):
    def scheme(name):
        return helpers.spec(4, True, 128, ragged=True, scale_dtype=torch.bfloat16) if "q_proj" in name else None

    account = ledger(quantised(scheme).output)
    assert account.bits_per_weight == 4 + 16 / 32  # the group is cut short by the width of 32


@pytest.mark.parametrize("tied", [True, False])
def test_plain_folders_have_a_ledger_too(saved, tied):
    folder = saved("llama", torch.bfloat16, tied)
    account = ledger(folder)
    assert sum(account.bits.values()) == 8 * file_bytes(folder)
    assert account.bits_per_weight is None
    assert account.quantised_weights == 0
    assert account.bits_per_weight_model == 16
    assert account.bits["embeddings"] == 96 * 32 * 16
    assert account.bits["head"] == (0 if tied else 96 * 32 * 16)
    assert account.bits["norms"] == 5 * 32 * 16
    assert all(account.bits[category] == 0 for category in QUANTISED)


def test_names_of_gpt2(saved):
    account = ledger(saved("gpt2"))
    assert account.bits["embeddings"] == (96 + 64) * 32 * 32
    assert account.bits["norms"] == (2 * 2 + 1) * 2 * 32 * 32
    assert account.bits["head"] == 96 * 32 * 32
    assert account.bits["layers"] == 2 * 12 * 32 * 32 * 32
    assert account.bits["other"] == 0


def test_a_quantised_embedding_counts_as_a_quantised_layer(quantised, helpers):
    account = ledger(quantised(lambda name: helpers.spec(8, True, -1), tied=True).output)
    assert account.bits["embeddings"] == account.bits["head"] == 0
    assert row(account, "model.embed_tokens").bits_per_weight == 8 + 32 / 32


def test_shards_are_summed(quantised):
    made = quantised(shard_bytes=20_000)
    account = ledger(made.output)
    assert account.file_bytes == file_bytes(made.output)
    assert sum(account.bits.values()) == 8 * account.file_bytes


def test_rows_are_in_natural_order(quantised):
    names = [row.name for row in ledger(quantised().output).rows]
    assert names.index("model.layers.0.mlp.down_proj") < names.index("model.layers.1.input_layernorm")


def test_the_writer_stores_it(quantised):
    output = quantised().output
    assert json.loads((output / "ledger.json").read_text()) == ledger(output).to_json()


def test_a_folder_without_a_model_is_refused(tmp_path, quantised):
    with pytest.raises(CheckpointError, match=r"is no model folder: it has no config\.json"):
        ledger(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="has no weights in safetensors files"):
        ledger(tmp_path)


def test_compressed_tensors_of_other_makers(quantised, tmp_path):
    """Groups by pattern and by class, as llm-compressor writes them; the most specific target wins."""
    from safetensors.torch import load_file, save_file

    made = quantised()
    tensors = load_file(made.output / "model.safetensors")
    for name, qtensor in made.qtensors.items():
        tensors[f"{name}.weight_shape"] = torch.tensor(qtensor.codes.shape)
    folder = tmp_path / "foreign"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    groups = {"a": (["Linear"], 8), "b": (["re:.*proj"], 4)}
    config_groups = {key: {"targets": names, "weights": {"num_bits": bits}} for key, (names, bits) in groups.items()}
    config = {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": config_groups}}
    (folder / "config.json").write_text(json.dumps(config))
    account = ledger(folder)
    assert account.bits["codes"] == 4 * account.quantised_weights
    assert account.bits["shapes"] == 128 * len(made.qtensors)
    assert sum(account.bits.values()) == 8 * account.file_bytes
    config_groups.clear()
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"no group of .* targets the quantised module model"):
        ledger(folder)


@pytest.mark.parametrize(
    ("config", "shapes", "name"),
    [
        (
            {"quant_method": "gptq", "bits": 3, "group_size": 32, "checkpoint_format": "gptq_v2"},
            {"qweight": (6, 32), "qzeros": (2, 3), "scales": (2, 32), "g_idx": (64,)},
            "gptq_v2",
        ),
        (
            {"quant_method": "awq", "bits": 4, "group_size": 32},
            {"qweight": (64, 4), "qzeros": (2, 4), "scales": (2, 32)},
            "awq",
        ),
    ],
)
def test_gptq_and_awq_of_other_makers(tmp_path, config, shapes, name):
    """A layer of 32 x 64 in two groups, and an embedding beside it."""
    from safetensors.torch import save_file

    tensors = {
        f"m.proj.{leaf}": torch.zeros(shape, dtype=torch.float16 if leaf == "scales" else torch.int32)
        for leaf, shape in shapes.items()
    }
    save_file(tensors | {"m.embed.weight": torch.zeros(10, 64)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    account = ledger(tmp_path)
    bits = config["bits"]
    assert account.format == account.to_json()["format"] == name
    assert row(account, "m.proj").code_bits == bits
    assert row(account, "m.proj").bits == {
        "codes": bits * 32 * 64, "zero_points": bits * 2 * 32, "scales": 16 * 2 * 32,
        **({"indices": 32 * 64} if name == "gptq_v2" else {}),
    }  # fmt: skip
    assert (account.quantised_weights, account.parameters) == (32 * 64, 32 * 64 + 10 * 64)
    assert sum(account.bits.values()) == 8 * account.file_bytes


def test_the_format_is_named(quantised, saved):
    assert ledger(quantised().output).format == "bitmend"
    assert ledger(saved("gpt2")).format == "unquantised"


def test_broken_descriptions_are_refused(tmp_path):
    from safetensors.torch import save_file

    tensors = {
        "m.weight_packed": torch.zeros(2, 1, dtype=torch.int32),
        "m.weight_zero_point": torch.zeros(1, 1, dtype=torch.int32),
        "m.weight_shape": torch.tensor([2, 8]),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    groups = {"a": {"targets": ["Linear"], "weights": {"num_bits": 4}}}
    described = {"quant_method": "compressed-tensors", "config_groups": groups}
    for config, message in ((described, "m has zero points but no scales"), (["gptq"], "must be a table; got")):
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
        with pytest.raises(CheckpointError, match=message):
            ledger(tmp_path)


def test_names_with_digits_that_are_no_numbers(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    names = ["model.²", "model." + "9" * 5000, "model.10", "model.9"]
    save_file({f"{name}.weight": torch.zeros(2) for name in names}, tmp_path / "model.safetensors")
    found = [row.name for row in ledger(tmp_path).rows]
    assert set(found) == set(names)
    assert found.index("model.9") < found.index("model.10")


def test_a_stored_shape_of_another_type_is_refused(tmp_path):
    config = {"quant_method": "compressed-tensors", "config_groups": {}}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    tensors = {"m.weight_packed": torch.zeros(2, 1, dtype=torch.int32), "m.weight_shape": torch.zeros(2)}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"m\.weight_shape must be int64 of shape \(2\); got float32"):
        ledger(tmp_path)


@pytest.mark.parametrize("kind", ["conv2d", "grouped_conv2d"])
def test_a_convolution_is_a_quantised_layer(helpers, tmp_path, kind):
    """8 x 18 codes of 4 bits fill 3 words a row, of which 24 bits are padding."""
    spec = helpers.spec(4, True, -1)
    tensors = site_tensors("stem", helpers.min_max(torch.randn(8, 18), spec)) | {"stem.bias": torch.zeros(8)}
    save_file(tensors, tmp_path / "model.safetensors")
    config = {"quantization_config": quantization_config({"stem": ManifestEntry(spec, (8, 18), kind)})}
    (tmp_path / "config.json").write_text(json.dumps(config))
    account = ledger(tmp_path)
    assert row(account, "stem").bits == {"codes": 8 * 72, "padding": 8 * 24, "scales": 8 * 32, "biases": 8 * 32}
    assert account.quantised_weights == 144
    assert account.bits_per_weight == 8 * (72 + 24 + 32) / 144
