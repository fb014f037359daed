import json
import os
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from bitmend.errors import CheckpointError
from bitmend.models import bounds as module
from bitmend.models.bounds import check_counts, no_more_than, refuse_special_files, stored


@pytest.mark.parametrize(
    "key", ["num_hidden_layers", "n_layer", "num_labels", "num_local_experts", "encoder_attention_heads"]
)
@pytest.mark.parametrize("value", [10**5 + 1, -(10**9), 1e9, 10**30, float("nan"), float("inf")])
def test_counts_that_cannot_be_meant(key, value):
    for config in ({key: value}, {"text_config": {"a": [{key: value}]}}):
        with pytest.raises(
            CheckpointError, match=rf"config\.json asks for {key} = .*, at most 100000 can be meant; give"
        ):
            check_counts(config, Path("config.json"))


def test_counts_and_sizes_of_real_models_pass():
    real = {"num_hidden_layers": 126, "vocab_size": 256_000, "max_position_embeddings": 10**7, "rope_theta": 5e8}
    check_counts(real | {"layer_types": ["full"] * 80, "num_labels": 2, "num_experts": None}, Path("config.json"))


def test_a_deeply_nested_config_is_no_recursion():
    deep: dict = {"num_layers": 3}
    for _ in range(50_000):
        deep = {"a": deep}
    check_counts(deep, Path("config.json"))
    while deep:
        deep = deep.pop("a", {})


def test_what_is_stored(tmp_path):
    save_file({"a": torch.zeros(4), "b": torch.zeros(2)}, tmp_path / "one.safetensors", {"format": "pt"})
    (tmp_path / "broken.safetensors").write_bytes(b"\xff" * 20)
    (tmp_path / "short.safetensors").write_bytes(b"123")
    (tmp_path / "old.bin").write_bytes(bytes(600))
    (tmp_path / "folder.bin").mkdir()
    found = stored(tmp_path)
    assert found.tensors == 3 + 10  # the metadata are counted as well
    assert found.num_bytes == sum(path.stat().st_size for path in tmp_path.iterdir() if path.is_file())


def test_a_tensor_that_is_described_twice(tmp_path):
    text = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    (tmp_path / "m.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"0")
    with pytest.raises(CheckpointError, match=r"the header of .* describes 'a' twice; copy or download it again"):
        stored(tmp_path)


def held(tmp_path):
    save_file({"a": torch.zeros(4)}, tmp_path / "one.safetensors")
    return stored(tmp_path)


def test_too_many_tensors(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "FREE_TENSORS", 10)
    found = held(tmp_path)
    with torch.device("meta"), no_more_than(found):
        nn.Sequential(*[nn.Linear(2, 2) for _ in range(7)])
    sentence = r"asks for a model of 15 or more tensors .* hold 1 tensors in \d+ bytes; give"
    with pytest.raises(CheckpointError, match=sentence), torch.device("meta"), no_more_than(found):
        nn.Sequential(*[nn.Linear(2, 2) for _ in range(8)])


def test_too_many_values_in_parameters_or_buffers(tmp_path):
    found = held(tmp_path)
    for build in (
        lambda: nn.Linear(10**6, 10**6, bias=False),
        lambda: nn.Module().register_buffer("a", torch.empty(10**12)),
    ):
        sentence = "with 1000000000000 or more values"
        with pytest.raises(CheckpointError, match=sentence), torch.device("meta"), no_more_than(found):
            build()
    assert nn.Linear(2, 2).weight.shape == (2, 2)


@pytest.mark.parametrize(
    "changes", [{"hidden_size": 10**9}, {"vocab_size": 10**9}, {"num_hidden_layers": 10**5}, {"head_dim": 10**10}]
)
def test_every_way_in_refuses_in_seconds(tiny, tmp_path, changes):
    from bitmend.evaluate.load import load_model
    from bitmend.formats.load import load
    from bitmend.models.find import find_adapter

    folder = tiny.save(tmp_path / "model", tiny.build())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    started = time.perf_counter()
    for way in (load, find_adapter, lambda folder: load_model(folder, "cpu", torch.float32)):
        with pytest.raises(CheckpointError, match=r"asks for|transformers cannot"):
            way(folder)
    assert time.perf_counter() - started < 60


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json", "x", "additional_chat_templates/a.jinja"])
def test_pipes_and_devices_are_refused_by_every_way_in(tiny, tmp_path, name):
    from bitmend.formats.integrity import read_config
    from bitmend.models.loading import read_config as read_model_config
    from bitmend.models.tokenizer import load_tokenizer

    folder = tiny.save(tmp_path / "model", tiny.build())
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        path.unlink(missing_ok=True)
        make(path)
        for way in (read_config, read_model_config, load_tokenizer):
            with pytest.raises(CheckpointError, match=rf"{name} is a pipe or a device and no file; do not trust"):
                way(folder)
    path.unlink()
    path.symlink_to(path)
    refuse_special_files(folder)
