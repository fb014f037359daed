import json
import resource
import time

import huggingface_hub
import pytest
import torch
import transformers

from bitmend.errors import ModelError
from bitmend.models.bounds import Stored
from bitmend.models.loading import empty_model, read_config, resolve_model


def test_existing_folder(tmp_path):
    assert resolve_model(tmp_path) == tmp_path
    assert resolve_model(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "a/b/c", "~/nowhere-at-all", "with space"])
def test_missing_folder(name):
    with pytest.raises(ModelError, match=r"the model folder .* does not exist; give an existing folder or a hub name"):
        resolve_model(name)


def test_file_instead_of_folder(tmp_path):
    path = tmp_path / "model.safetensors"
    path.touch()
    with pytest.raises(ModelError, match=r"is a file, need the folder of a model; give the folder that holds config"):
        resolve_model(str(path))


@pytest.mark.parametrize(
    "error", [OSError("no\nnetwork"), huggingface_hub.errors.OfflineModeIsEnabled("off"), KeyError()]
)
def test_hub_failure_is_one_sentence(monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(
        ModelError, match=r"org/name is no local folder and could not be fetched .*; check the name"
    ) as info:
        resolve_model("org/name")
    assert "\n" not in str(info.value)


def test_hub_download(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: asked.append(name) or str(tmp_path))
    assert resolve_model("gpt2") == tmp_path
    assert asked == ["gpt2", "gpt2"]  # the second time for how an encoder pools


def test_no_config(tmp_path):
    with pytest.raises(ModelError, match=r"has no config\.json; give the folder of a model"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "is not readable JSON"),
        ("[]", "holds a list, need a JSON object"),
        ("{}", "has no model_type"),
        ('{"model_type": "unheard-of"}', r"transformers .* cannot read .*\(model_type 'unheard-of'\)"),
        (
            '{"model_type": "unheard-of", "auto_map": {"AutoConfig": "x.Y"}}',
            "needs code that comes with the model; read that code, and allow it with trust_remote_code",
        ),
        ('{"model_type": "llama", "hidden_size": "wide"}', r"cannot read .*\(model_type 'llama'\)"),
    ],
)
def test_broken_config(tmp_path, text, sentence):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=sentence):
        read_config(tmp_path)


REMOTE = """
from transformers import LlamaConfig, LlamaForCausalLM
class MyConfig(LlamaConfig):
    model_type = "my-own"
class MyModel(LlamaForCausalLM):
    config_class = MyConfig
"""


def test_remote_code_only_when_allowed(tmp_path, families, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    (tmp_path / "own_model.py").write_text(REMOTE)
    content = families["llama"].config().to_dict()
    content |= {"model_type": "my-own", "auto_map": {"AutoConfig": "own_model.MyConfig"}}
    content["auto_map"]["AutoModelForCausalLM"] = "own_model.MyModel"
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match="needs code that comes with the model"):
        read_config(tmp_path)
    config = read_config(tmp_path, trust_remote_code=True)
    with pytest.raises(ModelError, match="needs code that comes with it"):
        empty_model(config)
    assert type(empty_model(config, trust_remote_code=True)).__name__ == "MyModel"


def test_skeleton_has_the_buffers_of_the_real_model(saved, family_name):
    folder = saved(family_name)
    real = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model = empty_model(read_config(folder))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert [name for name, _ in model.named_buffers()] == [name for name, _ in real.named_buffers()]
    for name, buffer in real.named_buffers():
        assert torch.equal(model.get_buffer(name), buffer), name
    assert not model.training


def test_skeleton_costs_neither_memory_nor_time(families):
    config = families["llama"].config(
        hidden_size=8192, intermediate_size=28672, num_attention_heads=64, num_hidden_layers=80, vocab_size=128256
    )
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    model = empty_model(config, torch.bfloat16)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert sum(parameter.numel() for parameter in model.parameters()) > 60e9
    assert grown < 200e6
    assert time.monotonic() - start < 60
    assert model.get_parameter("lm_head.weight").dtype == torch.bfloat16


def test_skeleton_leaves_torch_and_config_as_they_were(families):
    config = families["llama"].config()
    before = config.to_dict()
    register = torch.nn.Module.register_parameter
    empty_model(config, torch.float16)
    assert config.to_dict() == before
    assert torch.nn.Module.register_parameter is register
    assert torch.get_default_dtype() == torch.float32
    assert not torch.nn.Linear(2, 2).weight.is_meta


def test_config_that_transformers_cannot_build():
    with pytest.raises(ModelError, match=r"transformers cannot build the model from its config .*; check config\.json"):
        empty_model(transformers.ViTConfig())


def test_a_deeply_nested_config_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"a":' * 100_000)
    with pytest.raises(ModelError, match="is not readable JSON"):
        read_config(tmp_path)


def test_code_that_cannot_be_built_on_meta_is_left_to_the_real_building(monkeypatch, tmp_path):
    calls = []

    def build(config, **options):
        calls.append(options)
        if len(calls) == 1:
            raise NotImplementedError("no meta")
        return torch.nn.Linear(2, 2)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_config", build)
    assert empty_model({}, held=Stored(tmp_path, 1, 100)).weight.shape == (2, 2)
    assert len(calls) == 2


def test_a_config_with_half_of_a_character_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "note": "\\ud800"}')
    with pytest.raises(ModelError, match="half of a character stands in it"):
        read_config(tmp_path)
