import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from bitmend.errors import CheckpointError
from bitmend.formats.hf_quantizer import VERIFY, BitmendConfig, attach_online_, swap_modules_
from bitmend.formats.load import load
from bitmend.formats.manifest import Manifest, ManifestEntry, quantization_config
from bitmend.formats.native import site_tensors
from bitmend.formats.writer import CheckpointWriter
from bitmend.numerics.activations import ActivationSpec
from bitmend.online import InputScheme
from bitmend.runtime.conv import QuantConv2d
from bitmend.runtime.embedding import QuantEmbedding, TiedQuantHead
from bitmend.runtime.linear import QuantLinear
from bitmend.sites import LAYER_VIEWS, layer_kind


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def is_outside(name):
    return name in ("lm_head", "model.embed_tokens", "transformer.wte")


@pytest.fixture
def warnings_of_transformers(monkeypatch):
    """Collect what transformers logs, which is how it tells of missing and unexpected tensors."""
    lines = []
    logger = transformers.utils.logging.get_logger("transformers.modeling_utils")
    monkeypatch.setattr(logger, "warning", lambda message, *rest, **more: lines.append(str(message)))
    return lines


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("outside", [False, True])
def test_loads_and_saves_with_transformers(
    quantised, helpers, ids, tmp_path, warnings_of_transformers, family, dtype, tied, outside
):
    inner, outer = helpers.spec(3, False, 16, scale_dtype=dtype), helpers.spec(8, True, -1)

    def scheme(name):
        return inner if ".layers." in name or ".h." in name else outer if outside and is_outside(name) else None

    made = quantised(scheme, family, dtype, tied)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(made.output, output_loading_info=True)
    assert not any(info.values())
    assert not warnings_of_transformers
    assert torch.equal(logits(model, ids), logits(made.dense, ids))
    assert model.dtype == dtype
    for name, qtensor in made.qtensors.items():
        assert torch.equal(model.get_submodule(name).dequantize(), qtensor.dequantize())

    model.save_pretrained(tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert config["files"] == {}  # written before the weights, so it cannot know their checksums
    assert config["modules"].keys() == made.qtensors.keys()
    state, again = model.state_dict(), load(tmp_path / "again").state_dict()
    assert state.keys() == again.keys()
    assert all(torch.equal(state[key], again[key]) and state[key].dtype == again[key].dtype for key in state)


def test_modules_stay_packed_and_a_tied_head_has_no_tensors(quantised, helpers):
    made = quantised(lambda name: helpers.spec(8, True, -1), tied=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(made.output)
    assert type(model.model.embed_tokens) is QuantEmbedding
    assert type(model.lm_head) is TiedQuantHead
    assert type(model.model.layers[0].mlp.up_proj) is QuantLinear
    assert not [name for name in model.state_dict() if name.startswith("lm_head")]
    assert model.model.embed_tokens.weight_packed.dtype == torch.int32
    model.tie_weights()  # users call it after resizing; there is nothing left to tie
    assert type(model.lm_head) is TiedQuantHead
    assert model.generate(torch.tensor([[5, 6]]), max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (1, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_another_dtype_changes_neither_codes_nor_scales(quantised, helpers, ids, dtype):
    def scheme(name):
        return helpers.spec(4, True, 16, scale_dtype=torch.float32) if name != "lm_head" else None

    made = quantised(scheme, dtype=torch.float32)
    model = transformers.AutoModelForCausalLM.from_pretrained(made.output, dtype=dtype)
    layer = model.model.layers[0].self_attn.q_proj
    assert (layer.weight_packed.dtype, layer.weight_scale.dtype) == (torch.int32, torch.float32)
    assert torch.equal(layer.dequantize(), made.qtensors["model.layers.0.self_attn.q_proj"].dequantize())
    assert layer.bias.dtype == model.model.norm.weight.dtype == logits(model, ids).dtype == dtype


def test_shards_load(quantised, ids):
    made = quantised(shard_bytes=20_000)
    assert (made.output / "model.safetensors.index.json").is_file()
    assert torch.equal(
        logits(transformers.AutoModelForCausalLM.from_pretrained(made.output), ids), logits(made.dense, ids)
    )


def test_the_inner_model_loads_alone(quantised, ids, tmp_path):
    made = quantised(tied=True)
    inner = transformers.AutoModel.from_pretrained(made.output)
    with torch.no_grad():
        assert torch.equal(inner(ids).last_hidden_state, made.dense.model(ids).last_hidden_state)


def test_altered_bytes_are_refused_unless_the_check_is_left_out(quantised):
    made = quantised()
    path = made.output / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="sha256 differs"):
        transformers.AutoModelForCausalLM.from_pretrained(made.output)
    config = transformers.AutoConfig.from_pretrained(made.output)
    config.quantization_config[VERIFY] = False
    transformers.AutoModelForCausalLM.from_pretrained(made.output, config=config)


def test_a_missing_tensor_is_refused_not_initialised_at_random(quantised, tmp_path):
    from safetensors.torch import load_file, save_file

    made = quantised()
    again = tmp_path / "again"
    transformers.AutoModelForCausalLM.from_pretrained(made.output).save_pretrained(again)  # no checksums
    tensors = load_file(again / "model.safetensors")
    norm = tensors.pop("model.norm.weight")
    save_file(tensors, again / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"the checkpoint lacks model\.norm\.weight, which LlamaForCausalLM needs"
    ):
        transformers.AutoModelForCausalLM.from_pretrained(again)
    save_file(tensors | {"model.norm.weight": norm[1:].clone()}, again / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"model\.norm\.weight has the shape \(31,\) in the file, but \(32,\) in the"
    ):
        transformers.AutoModelForCausalLM.from_pretrained(again)
    save_file(tensors | {"model.norm.weight": norm.int()}, again / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is torch\.int32 in the file, but torch\.float32"):
        transformers.AutoModelForCausalLM.from_pretrained(again)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"num_hidden_layers": 1},
            r"quantises model\.layers\.1\.self_attn\.q_proj, which LlamaForCausalLM does not have",
        ),
        (
            {"intermediate_size": 64},
            r"mlp\.gate_proj has the shape \(48, 32\) in the checkpoint, but \(64, 32\) in the model",
        ),
    ],
)
def test_a_config_that_does_not_fit_is_refused(quantised, change, message):
    made = quantised()
    config = transformers.AutoConfig.from_pretrained(made.output)
    config.update(change)
    with pytest.raises(CheckpointError, match=message):
        transformers.AutoModelForCausalLM.from_pretrained(made.output, config=config)


def test_a_kind_that_does_not_fit_is_refused(quantised):
    made = quantised()
    config = transformers.AutoConfig.from_pretrained(made.output)
    config.quantization_config["modules"]["model.layers.0.mlp.up_proj"]["kind"] = "conv1d"
    del config.quantization_config["seal"]
    with pytest.raises(CheckpointError, match="is of kind 'conv1d' in the checkpoint, but Linear in the model"):
        transformers.AutoModelForCausalLM.from_pretrained(made.output, config=config)


def test_a_tie_to_what_is_no_head_is_refused(quantised, helpers):
    made = quantised(lambda name: helpers.spec(8, True, -1), tied=True)
    config = transformers.AutoConfig.from_pretrained(made.output)
    config.quantization_config["tied"] = {"model.norm": "model.embed_tokens"}
    del config.quantization_config["seal"]
    with pytest.raises(
        CheckpointError, match=r"ties model\.norm to model\.embed_tokens, but model\.norm is no linear layer"
    ):
        transformers.AutoModelForCausalLM.from_pretrained(made.output, config=config)


def test_quantising_on_the_fly_is_refused(saved, quantised):
    config = json.loads((quantised().output / "config.json").read_text())["quantization_config"]
    plain = saved("gpt2")
    with pytest.raises(ValueError, match="does require the model to be pre-quantized"):
        transformers.AutoModelForCausalLM.from_pretrained(plain, quantization_config=BitmendConfig(**config))


def test_a_loaded_model_is_no_training_matter(quantised):
    model = transformers.AutoModelForCausalLM.from_pretrained(quantised().output)
    assert model.hf_quantizer.is_serializable()
    assert not model.hf_quantizer.is_trainable


# ------------------------------------------------------------------------------------------------ experts
@pytest.mark.parametrize("family", ["mixtral", "granite-moe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_load_one_by_one_and_save_again(
    quantised, helpers, ids, tmp_path, warnings_of_transformers, family, dtype
):
    spec = helpers.spec(4, True, 16, scale_dtype=dtype)

    def scheme(name):  # one expert stays as it is, so that plain and packed experts stand side by side
        return spec if ".layers." in name and ".experts.1." not in name else None

    made = quantised(scheme, family, dtype)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(made.output, output_loading_info=True)
    assert not any(info.values())
    assert not warnings_of_transformers
    experts = next(module for name, module in model.named_modules() if name.endswith("experts"))
    kinds = [type(next(iter(expert.children()))).__name__ for expert in experts.children()]
    assert kinds == ["QuantLinear", "Linear", "QuantLinear"]
    assert torch.equal(logits(model, ids), logits(made.dense, ids))

    model.save_pretrained(tmp_path / "again")
    before, after = (set(load_file(folder / "model.safetensors")) for folder in (made.output, tmp_path / "again"))
    assert before == after
    state, again = model.state_dict(), load(tmp_path / "again").state_dict()
    assert state.keys() == again.keys()
    assert all(torch.equal(state[key], again[key]) for key in state)


def test_a_missing_tensor_of_an_expert_is_refused(quantised, helpers):
    made = quantised(lambda name: helpers.spec() if "q_proj" in name else None, "mixtral")
    path = made.output / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.experts.2.w1.weight"]
    save_file(tensors, path, {"format": "pt"})
    config = transformers.AutoConfig.from_pretrained(made.output)
    config.quantization_config["files"] = {}
    with pytest.raises(CheckpointError, match=r"the checkpoint lacks model\.layers\.1\.mlp\.experts\.2\.w1\.weight"):
        transformers.AutoModelForCausalLM.from_pretrained(made.output, config=config)


def test_the_inner_model_of_a_mixture_of_experts_loads_alone(quantised, ids):
    made = quantised(family="mixtral", tied=True)
    inner = transformers.AutoModel.from_pretrained(made.output)
    with torch.no_grad():
        assert torch.equal(inner(ids).last_hidden_state, made.dense.model(ids).last_hidden_state)


# ------------------------------------------------------------------------------------------------ convolutions
def resnet(dtype=torch.float32):
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3
    )
    return transformers.ResNetForImageClassification(config).to(dtype).eval()


def quantise_convolutions(model, helpers, spec):
    """Put dequantised weights into a model; return its manifest and the packed tensors."""
    entries, tensors = {}, {}
    for name, module in model.named_modules():
        kind = layer_kind(module)
        if kind in ("conv2d", "grouped_conv2d"):
            view = LAYER_VIEWS[kind]
            qtensor = helpers.min_max(view.read(module), spec)
            entries[name] = ManifestEntry(spec, tuple(qtensor.codes.shape), kind)
            tensors |= site_tensors(name, qtensor)
            view.write_(module, qtensor.dequantize(module.weight.dtype))
    return Manifest(entries), tensors


def pixels(dtype=torch.float32):
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_convolutions_are_packed(helpers, dtype):
    model, packed = resnet(dtype), resnet(dtype)
    before = logits(model, pixels(dtype))
    manifest, tensors = quantise_convolutions(model, helpers, helpers.spec(3, False, -1, scale_dtype=dtype))
    swapped = swap_modules_(packed, manifest, None)
    assert swapped == {name: name for name in manifest.modules}
    kinds = {name: type(module) for name, module in packed.named_modules() if "convolution" in name}
    assert len(kinds) == 6  # the first, two in each of two blocks, and a shortcut
    assert set(kinds.values()) == {QuantConv2d}
    missing, unexpected = packed.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert not [name for name in missing if name.rpartition(".")[0] in manifest.modules]
    assert torch.equal(logits(packed, pixels(dtype)), logits(model, pixels(dtype)))
    assert not torch.equal(logits(packed, pixels(dtype)), before)


def test_a_model_of_convolutions_loads_and_saves_with_transformers(helpers, tmp_path, warnings_of_transformers):
    model = resnet()
    model.save_pretrained(tmp_path / "source")
    manifest, tensors = quantise_convolutions(model, helpers, helpers.spec(4, True, -1))
    others = {name: value for name, value in model.state_dict().items() if "convolution" not in name}
    with CheckpointWriter(tmp_path / "source", tmp_path / "quantised") as writer:
        writer.add("all", tensors | others)
        writer.finish(quantization_config(manifest.modules), {})
    load(tmp_path / "quantised").save_pretrained(tmp_path / "again")
    for folder in ("quantised", "again"):
        found, info = transformers.AutoModelForImageClassification.from_pretrained(
            tmp_path / folder, output_loading_info=True
        )
        assert not any(info.values())
        assert torch.equal(logits(found, pixels()), logits(model, pixels()))
    assert not warnings_of_transformers


def test_a_grouped_convolution_is_packed(helpers):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3, groups=2), torch.nn.Conv2d(8, 8, 3, padding=1, groups=8))
    packed = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3, groups=2), torch.nn.Conv2d(8, 8, 3, padding=1, groups=8))
    manifest, tensors = quantise_convolutions(model, helpers, helpers.spec(4, True, -1))
    assert [entry.shape for entry in manifest.modules.values()] == [(8, 18), (8, 9)]
    swap_modules_(packed, manifest, None)
    packed.load_state_dict(tensors | {name: one for name, one in model.state_dict().items() if "bias" in name})
    pictures = torch.randn(2, 4, 6, 6)
    with torch.no_grad():
        assert torch.equal(packed(pictures), model(pictures))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (((8, 36), "linear"), "0 is of kind 'linear' in the checkpoint, but Conv2d in the model"),
        (((8, 36), "grouped_conv2d"), "0 is of kind 'grouped_conv2d' in the checkpoint, but Conv2d in the model"),
        (((8, 18), "conv2d"), r"0 has the shape \(8, 18\) in the checkpoint, but \(8, 36\) in the model"),
    ],
)
def test_a_convolution_that_does_not_fit_is_refused(helpers, entry, message):
    with pytest.raises(CheckpointError, match=message):
        swap_modules_(
            torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3)), Manifest({"0": ManifestEntry(helpers.spec(), *entry)}), None
        )


@pytest.mark.parametrize("packed", [False, True])
def test_activations_of_a_convolution_are_refused(helpers, packed):
    """They are rounded along the last axis, which is a line of the picture there."""
    model, spec = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3)), helpers.spec(4, True, -1)
    modules = {"0": ManifestEntry(spec, (8, 36), "conv2d")} if packed else {}
    manifest = Manifest(modules, inputs={"0": InputScheme(activations=ActivationSpec(4))})
    swap_modules_(model, manifest, None)
    with pytest.raises(CheckpointError, match=r"changes activations at 0, which is no layer, .* on the last axis"):
        attach_online_(model, manifest)
