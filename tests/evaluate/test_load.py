import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from bitmend.errors import CheckpointError, ModelError, RequestError
from bitmend.evaluate.load import check_context, load_model, register_formats


def load(folder):
    return load_model(folder, "cpu", torch.float32)


@pytest.fixture
def copy(lab, tmp_path):
    return lab.save(tmp_path / "model", lab.model())


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_a_folder_loads_in_the_wanted_dtype(copy, lab):
    bars = logging.is_progress_bar_enabled()
    loaded = load_model(copy, "cpu", torch.bfloat16)
    assert loaded.model.dtype == torch.bfloat16
    assert not loaded.model.training
    assert loaded.name == str(copy)
    assert len(loaded.tokenizer) == lab.vocabulary
    assert logging.is_progress_bar_enabled() == bars


def test_formats_register_themselves():
    register_formats()
    register_formats()


@pytest.mark.parametrize("place", ["top", "text_config"])
def test_an_unknown_quantisation_is_refused(copy, place):
    description = {"quantization_config": {"quant_method": "magic"}}
    change_config(copy, **(description if place == "top" else {"text_config": description}))
    with pytest.raises(CheckpointError, match=r"config.json says 'magic'; known: .*gptq"):
        load(copy)


def test_missing_superfluous_and_misshapen_tensors_are_refused(copy):
    name = "model.layers.0.mlp.up_proj.weight"
    change_weights(copy, lambda tensors: tensors.update(stranger=torch.zeros(2)))
    with pytest.raises(CheckpointError, match="the config has no place for stranger; copy the model again"):
        load(copy)
    change_weights(copy, lambda tensors: (tensors.pop("stranger"), tensors.pop(name)))
    with pytest.raises(CheckpointError, match=f"the file lacks {name}"):
        load(copy)
    change_weights(copy, lambda tensors: tensors.update({name: torch.zeros(5, 16)}))
    with pytest.raises(CheckpointError, match=r"loading failed|the shape differs from the config's for"):
        load(copy)


def test_a_file_that_is_cut_short_is_refused(copy):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"a complete checkpoint .* is required, but loading failed"):
        load(copy)


def test_a_folder_without_model_or_tokenizer_is_refused(copy, tmp_path):
    with pytest.raises(ModelError, match="none"):
        load(tmp_path / "none")
    (copy / "tokenizer.json").unlink()
    (copy / "tokenizer_config.json").unlink()
    with pytest.raises(RequestError, match=r"a tokenizer is required to read text, but it could not be loaded"):
        load(copy)


def test_windows_must_fit_the_context(copy, lab):
    model = load(copy)
    check_context(model, lab.context)
    with pytest.raises(RequestError, match="context of 16 tokens, but they have 17; pass --window-length 16 or less"):
        check_context(model, lab.context + 1)


@pytest.mark.parametrize("described", [3, "x", [1], {"quant_method": []}, {"quant_method": 3}])
def test_a_quantization_config_that_is_no_description_is_refused(copy, described):
    change_config(copy, quantization_config=described)
    with pytest.raises((CheckpointError, ModelError), match=r"quantization_config must be a table|cannot read"):
        load(copy)


def test_a_text_config_that_is_no_table(copy):
    change_config(copy, text_config=[3])
    with pytest.raises((CheckpointError, ModelError)):
        load(copy)


def test_what_bounds_say_comes_through(copy):
    change_config(copy, hidden_size=10**9)
    with pytest.raises(CheckpointError, match=r"asks for a model of \d+ or more tensors with \d+ or more values, but"):
        load(copy)


@pytest.mark.parametrize("name", ["../outside/part.safetensors", "/etc/passwd", "..\\part.safetensors", "config.json"])
def test_an_index_that_names_files_elsewhere_is_refused_before_transformers_opens_them(copy, name):
    tensors = load_file(copy / "model.safetensors")
    (copy.parent / "outside").mkdir()
    (copy / "model.safetensors").rename(copy.parent / "outside" / "part.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, name)}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"need a path inside|need a \.safetensors file"):
        load(copy)
