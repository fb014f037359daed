"""Loading, and what happens to checkpoints that are not as they were written."""

import json
import random
import shutil
import struct
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import bitmend.formats.load
from bitmend.errors import CheckpointError, QuantizationError
from bitmend.formats.load import load


def equal(state, other):
    return state.keys() == other.keys() and all(
        torch.equal(state[key], other[key]) and state[key].dtype == other[key].dtype for key in state
    )


def test_loads_what_was_saved_bit_for_bit(quantised, ids):
    made = quantised()
    model = load(made.output)
    for name, qtensor in made.qtensors.items():
        assert torch.equal(model.get_submodule(name).dequantize(), qtensor.dequantize())
    with torch.no_grad():
        assert torch.equal(model(ids).logits, made.dense(ids).logits)
    assert load(str(made.output), dtype=torch.bfloat16).dtype == torch.bfloat16


def test_plain_folders_load_too(saved):
    folder = saved("gpt2")
    assert type(load(folder)).__name__ == "GPT2LMHeadModel"
    config = json.loads((folder / "config.json").read_text())
    del config["architectures"]
    (folder / "config.json").write_text(json.dumps(config))
    assert type(load(folder)).__name__ == "GPT2LMHeadModel"


def test_the_bytes_are_read_once_for_checksums(quantised, monkeypatch):
    made, count = quantised(), []
    import bitmend.formats.integrity as integrity

    digest = integrity.sha256_of
    monkeypatch.setattr(integrity, "sha256_of", lambda path: count.append(path) or digest(path))
    load(made.output)
    assert len(count) == 1
    load(made.output, verify=False)
    assert len(count) == 1


def test_folders_that_cannot_be_loaded(tmp_path, quantised):
    with pytest.raises(CheckpointError, match=r"there is no model folder .*none"):
        load(tmp_path / "none")
    made = quantised()
    path = made.output / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="it is cut short or altered"):
        load(made.output)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"has neither model\.safetensors nor"):
        load(made.output)


def edit(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def test_a_config_that_transformers_refuses(quantised):
    made = quantised()
    edit(made.output, lambda config: config.update(model_type="no-such-model"))
    with pytest.raises(CheckpointError, match=r"transformers cannot load .*quantised: "):
        load(made.output)


def test_more_layers_than_tensors_are_refused_before_they_are_built(quantised):
    made = quantised()
    edit(made.output, lambda config: config.update(num_hidden_layers=10**9))
    with pytest.raises(CheckpointError, match="asks for num_hidden_layers = 1000000000, but the checkpoint has"):
        load(made.output)
    edit(made.output, lambda config: config.update(text_config={"num_hidden_layers": 10**9}, num_hidden_layers=2))
    with pytest.raises(CheckpointError, match="asks for num_hidden_layers"):
        load(made.output)


def test_a_left_over_tensor_is_refused(quantised):
    made = quantised()
    path = made.output / "model.safetensors"
    save_file(load_file(path) | {"model.extra": torch.ones(1)}, path, {"format": "pt"})
    edit(made.output, lambda config: config["quantization_config"].update(files={}))
    with pytest.raises(CheckpointError, match=r"does not fit LlamaForCausalLM: unexpected tensor model\.extra"):
        load(made.output)


def test_a_checkpoint_without_its_manifest_is_refused(quantised):
    made = quantised()
    edit(made.output, lambda config: config.pop("quantization_config"))
    with pytest.raises(CheckpointError, match="does not fit LlamaForCausalLM: missing tensor"):
        load(made.output)


# ---------------------------------------------------------------------------------------------- mutations
def header_of(data):
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(table, rest):
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + rest


def cut(data, chance):
    return data[: chance.randrange(len(data))]


def grow(data, chance):
    return data + bytes(chance.randrange(1, 100))


def flip(data, chance):
    altered = bytearray(data)
    altered[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(altered)


def flip_in_header(data, chance):
    altered = bytearray(data)
    altered[chance.randrange(8 + struct.unpack("<Q", data[:8])[0])] ^= 1 << chance.randrange(8)
    return bytes(altered)


def alter_entry(data, chance):
    table, rest = header_of(data)
    name = chance.choice([name for name in table if name != "__metadata__"])
    item = table[name]
    match chance.randrange(6):
        case 0:
            item["dtype"] = chance.choice(["F32", "I32", "BF16", "F16", "I64", "U8", "X"])
        case 1:
            side = chance.randrange(len(item["shape"]))
            item["shape"][side] = chance.choice([0, 1, -1, 2**40, item["shape"][side] + 1, "2", None])
        case 2:
            end = chance.randrange(2)
            item["data_offsets"][end] += chance.choice([-4, 4, 2**50, -(2**50)])
        case 3:
            item["shape"] = item["shape"][::-1] + chance.choice([[], [1]])
        case 4:
            del table[name]
        case 5:
            table[name + "x"] = table.pop(name)
    return with_header(table, rest)


def swap_names(data, chance):
    """Two tensors of one shape change places: nothing but a checksum can tell."""
    table, rest = header_of(data)
    first, second = chance.sample([name for name in table if name != "__metadata__"], 2)
    table[first], table[second] = table[second], table[first]
    return with_header(table, rest)


FILE_MUTATIONS = [cut, grow, flip, flip_in_header, alter_entry, swap_names]


def places(value, path=()):
    """Every path into a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def alter_json(table, chance):
    """Replace, remove or rename one value anywhere in a JSON table."""
    path = chance.choice([path for path in places(table) if path])
    for key in path[:-1]:
        table = table[key]
    key, old = path[-1], table[path[-1]]
    others = [None, True, -1, 0, 3, 10**12, "", "x", [], {}, 1.5]
    if isinstance(old, int):
        others += [old + 1, old * 2, -old, str(old)]
    match chance.randrange(4):
        case 0 if isinstance(table, dict):
            del table[key]
        case 1 if isinstance(table, dict):
            table[f"{key}x"] = table.pop(key)
        case _:
            table[key] = chance.choice(others)


@pytest.fixture(scope="module")
def good(helpers, tmp_path_factory):
    """A checkpoint with several schemes, zero points, a tied quantised embedding, and its state."""

    def scheme(name):
        if "layers" not in name:
            return helpers.spec(8, True, -1)
        return helpers.spec(3, False, 16) if "mlp" in name else helpers.spec(4, True, 16, scale_dtype=torch.bfloat16)

    folder = tmp_path_factory.mktemp("good")
    helpers.build("llama", torch.float32, True).save_pretrained(folder / "source")
    made = helpers.quantise(folder / "source", folder / "quantised", scheme)
    return made.output, load(made.output).state_dict()


@pytest.fixture
def original(good, tmp_path):
    """A copy to spoil."""
    folder, state = good
    return Path(shutil.copytree(folder, tmp_path / "copy")), state


def outcome(folder, state, **options):
    """Return the sentence of a refusal, or None when the very same values were loaded."""
    try:
        model = load(folder, **options)
    except QuantizationError as error:
        return str(error)
    assert equal(model.state_dict(), state)
    return None


@pytest.mark.parametrize("seed", range(180))
def test_altered_weight_files_are_refused(original, tmp_path, seed):
    folder, state = original
    path = folder / "model.safetensors"
    mutate, chance = FILE_MUTATIONS[seed % len(FILE_MUTATIONS)], random.Random(seed)
    data = path.read_bytes()
    altered = mutate(data, chance)
    path.write_bytes(altered)
    assert (outcome(folder, state) is None) == (altered == data)


@pytest.mark.parametrize("seed", range(60))
def test_altered_headers_are_refused_without_checksums_too(original, seed):
    """What is left then is what lies in the values themselves, which these mutations do not touch."""
    folder, state = original
    path = folder / "model.safetensors"
    mutate, chance = [cut, grow, alter_entry][seed % 3], random.Random(seed)
    path.write_bytes(mutate(path.read_bytes(), chance))
    assert outcome(folder, state, verify=False) is not None


@pytest.mark.parametrize("seed", range(150))
def test_altered_manifests_are_refused_or_harmless(original, seed):
    folder, state = original
    edit(folder, lambda config: alter_json(config["quantization_config"], random.Random(seed)))
    outcome(folder, state)


@pytest.mark.parametrize("seed", range(100))
def test_altered_configs_are_refused_or_leave_the_tensors(original, seed):
    folder, state = original
    edit(folder, lambda config: alter_json(config, random.Random(seed)))
    outcome(folder, state)


def test_the_model_class_is_that_of_the_checkpoint():
    text, picture = transformers.GPT2Config(), transformers.ViTConfig()
    name = bitmend.formats.load._model_class({"architectures": ["GPT2Model"]}, text).__name__
    assert name == "GPT2Model"
    for unknown in ([], ["Nonsense"], [3], ["AutoTokenizer"]):
        found = [bitmend.formats.load._model_class({"architectures": unknown}, one).__name__ for one in (text, picture)]
        assert found == ["AutoModelForCausalLM", "AutoModelForImageClassification"]
