import importlib.util
import json
import os
import sys
import tarfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification

from bitmend import assets
from bitmend.errors import CheckpointError, ModelError, OutputError, RequestError
from bitmend.models.cifar_resnet import (
    CIFAR10_LABELS,
    BasicBlock,
    CifarResNetConfig,
    CifarResNetForImageClassification,
    ZeroPadShortcut,
    convert,
)
from bitmend.models.loading import read_config

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "make_cifar_resnet.py"


# ---------------------------------------------------------------------------------------------- by hand
@pytest.mark.parametrize(
    ("blocks", "parameters"),
    [
        # stem 3*16*9 + 2*16 = 464; stages of n = 3 blocks:
        #   6 * (16*16*9) + 6*2*16                    =  14,016
        #   32*16*9 + 5 * (32*32*9) + 6*2*32          =  51,072
        #   64*32*9 + 5 * (64*64*9) + 6*2*64          = 203,520
        # head 64*10 + 10 = 650
        (3, 269_722),
        (5, 464_154),
    ],
)
def test_as_many_parameters_as_the_published_networks(blocks, parameters):
    with torch.device("meta"):
        model = CifarResNetForImageClassification(CifarResNetConfig(blocks_per_stage=blocks, num_labels=10))
    assert sum(one.numel() for one in model.parameters() if one.requires_grad) == parameters
    layers = [part for part in model.modules() if isinstance(part, nn.Conv2d | nn.Linear)]
    assert len(layers) == 6 * blocks + 2


def test_shortcut_by_hand():
    hidden = torch.arange(1.0, 19.0).view(1, 2, 3, 3)  # rows 1 2 3 / 4 5 6 / 7 8 9, then 10 to 18
    kept = torch.tensor([[[1.0, 3.0], [7.0, 9.0]], [[10.0, 12.0], [16.0, 18.0]]])
    given = ZeroPadShortcut(2, 4, stride=2)(hidden)
    assert given.shape == (1, 4, 2, 2)
    assert torch.equal(given[0, 1:3], kept)
    assert not given[0, [0, 3]].any()


def test_shortcut_that_only_pads():
    hidden = torch.randn(2, 3, 4, 5)
    given = ZeroPadShortcut(3, 7, stride=1)(hidden)
    assert torch.equal(given[:, 2:5], hidden)
    assert given.shape == (2, 7, 4, 5)
    assert not given[:, [0, 1, 5, 6]].any()


def test_block_by_hand():
    # Convolutions of zeros leave relu(norm2's bias + shortcut): -5 + 1..9 of the kept pixels 1, 3, 7, 9.
    block = BasicBlock(2, 4, stride=2).eval()
    with torch.no_grad():
        block.conv2.weight.zero_()
        block.norm2.bias.fill_(-5.0)
        given = block(torch.arange(1.0, 10.0).view(1, 1, 3, 3).expand(1, 2, 3, 3))
    assert torch.equal(given[0, 1], torch.tensor([[0.0, 0.0], [2.0, 4.0]]))
    assert not given[0, 0].any()


def test_first_stage_keeps_the_size_and_needs_no_shortcut_module():
    block = BasicBlock(4, 4, stride=1)
    assert isinstance(block.shortcut, nn.Identity)
    assert block(torch.zeros(1, 4, 5, 6)).shape == (1, 4, 5, 6)


# ---------------------------------------------------------------------------------------------- a published file
def published(channels=(4, 8, 12), blocks=2, colours=3, labels=10, seed=0) -> dict[str, torch.Tensor]:
    """Random tensors under the original names, with norms that are far from the identity."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    def norm(name, width):
        return {
            f"{name}.weight": 1 + 0.3 * normal(width),
            f"{name}.bias": 0.3 * normal(width),
            f"{name}.running_mean": 0.3 * normal(width),
            f"{name}.running_var": 0.5 + normal(width).abs(),
        }

    def conv(out, into):
        return normal(out, into, 3, 3) / (3 * into**0.5)

    tensors = {"conv1.weight": conv(channels[0], colours), **norm("bn1", channels[0])}
    before = channels[0]
    for stage, width in enumerate(channels, start=1):
        for block in range(blocks):
            name = f"layer{stage}.{block}"
            tensors |= {f"{name}.conv1.weight": conv(width, before), **norm(f"{name}.bn1", width)}
            tensors |= {f"{name}.conv2.weight": conv(width, width), **norm(f"{name}.bn2", width)}
            before = width
    return tensors | {"linear.weight": normal(labels, channels[-1]), "linear.bias": normal(labels)}


def plain_forward(tensors, pixels, num_stages=3, num_blocks=2):
    """The network once more, from the paper, in float64 and without a module."""
    double = {name: tensor.double() for name, tensor in tensors.items()}

    def norm(x, name):
        mean, variance, weight, bias = (
            double[f"{name}.{leaf}"] for leaf in ("running_mean", "running_var", "weight", "bias")
        )
        return functional.batch_norm(x, mean, variance, weight, bias, eps=1e-5)

    def shortcut(x, like):
        out = torch.zeros_like(like)
        start = (like.shape[1] - x.shape[1]) // 2
        step = 1 if x.shape[2] == like.shape[2] else 2
        out[:, start : start + x.shape[1]] = x[:, :, ::step, ::step]
        return out

    x = functional.relu(norm(functional.conv2d(pixels.double(), double["conv1.weight"], padding=1), "bn1"))
    for stage in range(1, num_stages + 1):
        for block in range(num_blocks):
            name = f"layer{stage}.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            y = functional.conv2d(x, double[f"{name}.conv1.weight"], stride=stride, padding=1)
            y = functional.conv2d(functional.relu(norm(y, f"{name}.bn1")), double[f"{name}.conv2.weight"], padding=1)
            y = norm(y, f"{name}.bn2")
            x = functional.relu(y + shortcut(x, y))
    return functional.linear(x.mean((2, 3)), double["linear.weight"], double["linear.bias"])


def saved_as(folder: Path, tensors, name="weights.safetensors") -> Path:
    folder.mkdir(exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / name)
    return folder / name


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def relative_error(given, wanted) -> float:
    return float((given.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("prefix", ["", "module."])
def test_conversion_computes_what_the_plain_network_computes(tmp_path, pixels, prefix):
    tensors = published()
    weights = saved_as(tmp_path, {prefix + name: tensor for name, tensor in tensors.items()})
    model = convert(weights, tmp_path / "new" / "model")
    assert (model.config.blocks_per_stage, model.config.stage_channels) == (2, [4, 8, 12])
    wanted = plain_forward(tensors, pixels)
    with torch.no_grad():
        assert relative_error(model(pixels).logits, wanted) < 1e-5  # float32 against float64


@pytest.mark.parametrize(("height", "width"), [(31, 33), (7, 5), (1, 1)])
def test_images_of_odd_sizes(tmp_path, height, width):
    tensors = published()
    model = convert(saved_as(tmp_path, tensors), tmp_path / "model")
    images = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert relative_error(model(images).logits, plain_forward(tensors, images)) < 1e-5


def test_other_numbers_of_stages_colours_and_labels(tmp_path):
    tensors = published(channels=(3, 5), blocks=1, colours=1, labels=2)
    model = convert(saved_as(tmp_path, tensors), tmp_path / "model", labels=("cat", "dog"))
    assert (model.config.blocks_per_stage, model.config.stage_channels) == (1, [3, 5])
    assert (model.config.num_channels, model.config.num_labels) == (1, 2)
    images = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        given = model(images).logits
    assert relative_error(given, plain_forward(tensors, images, num_stages=2, num_blocks=1)) < 1e-5


def test_counters_of_training_steps_are_taken_along(tmp_path):
    counters = {"bn1.num_batches_tracked": torch.tensor(7), "layer3.1.bn2.num_batches_tracked": torch.tensor(9)}
    model = convert(saved_as(tmp_path, published() | counters), tmp_path / "model")
    assert int(model.stem.norm.num_batches_tracked) == 7
    assert int(model.stages[2][1].norm2.num_batches_tracked) == 9
    assert int(model.stages[0][0].norm1.num_batches_tracked) == 0


def test_conversion_draws_no_random_numbers(tmp_path):
    weights = saved_as(tmp_path, published())
    state = torch.get_rng_state()
    convert(weights, tmp_path / "model")
    assert torch.equal(torch.get_rng_state(), state)


# ---------------------------------------------------------------------------------------------- the folder
def test_folder_is_complete(tmp_path):
    convert(saved_as(tmp_path, published()), tmp_path / "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "weights.safetensors"]
    names = sorted(path.name for path in (tmp_path / "model").iterdir())
    assert names == ["config.json", "model.safetensors", "preprocessor_config.json"]
    content = json.loads((tmp_path / "model" / "config.json").read_text())
    assert content["model_type"] == "cifar_resnet"
    assert content["architectures"] == ["CifarResNetForImageClassification"]
    assert content["id2label"] == {str(index): label for index, label in enumerate(CIFAR10_LABELS)}
    assert content["label2id"] == {label: index for index, label in enumerate(CIFAR10_LABELS)}
    config = read_config(tmp_path / "model")
    assert type(config) is CifarResNetConfig
    assert (config.blocks_per_stage, config.stage_channels, config.image_size) == (2, [4, 8, 12], 32)


def test_processor_scales_and_normalises_and_nothing_else(tmp_path):
    convert(saved_as(tmp_path, published()), tmp_path / "model")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "model", backend="pil")
    values = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    given = processor(Image.fromarray(values), return_tensors="pt")["pixel_values"]
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    wanted = torch.from_numpy((values / 255 - mean) / std).permute(2, 0, 1)
    assert given.shape == (1, 3, 32, 32)
    torch.testing.assert_close(given[0].double(), wanted, rtol=0, atol=1e-6)
    grey = processor(Image.new("L", (50, 40), 255), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(grey[0, :, 5, 5].double(), torch.from_numpy((1 - mean) / std), rtol=0, atol=1e-6)
    assert grey.shape == (1, 3, 32, 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reloading_gives_the_same_bits(tmp_path, pixels, dtype):
    made = convert(saved_as(tmp_path, published()), tmp_path / "model").to(dtype)
    loaded, told = AutoModelForImageClassification.from_pretrained(
        tmp_path / "model", dtype=dtype, output_loading_info=True
    )
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(loaded) is CifarResNetForImageClassification
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "again")
    assert again.dtype == dtype
    states = [model.state_dict() for model in (made, loaded, again)]
    assert list(states[0]) == list(states[1]) == list(states[2])
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name
        assert torch.equal(tensor, states[2][name]), name
    with torch.no_grad():
        logits = [model(pixels).logits for model in (made, loaded, again)]
    assert logits[0].dtype == dtype
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])
    stored = load_file(tmp_path / "again" / "model.safetensors")
    assert set(stored) == set(states[0])


# ---------------------------------------------------------------------------------------------- as a class of transformers
def small_model() -> CifarResNetForImageClassification:
    torch.manual_seed(0)
    return CifarResNetForImageClassification(
        CifarResNetConfig(blocks_per_stage=1, stage_channels=[4, 8], num_labels=3)
    ).eval()


def test_loss_tuple_and_hidden_states():
    model, images, labels = small_model(), torch.randn(2, 3, 8, 8), torch.tensor([2, 0])
    with torch.no_grad():
        output = model(images, labels=labels, output_hidden_states=True)
        as_tuple = model(pixel_values=images, labels=labels, return_dict=False)
    assert torch.equal(output.loss, functional.cross_entropy(output.logits, labels))
    assert [tuple(state.shape) for state in output.hidden_states] == [(2, 4, 8, 8), (2, 4, 8, 8), (2, 8, 4, 4)]
    assert len(as_tuple) == 2
    assert torch.equal(as_tuple[1], output.logits)
    assert model(images).hidden_states is None
    assert model(images).loss is None


def test_all_that_has_weights_passes_one_tensor_on():
    model, images = small_model(), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        hidden = images
        for part in (model.stem, *(block for stage in model.stages for block in stage), model.pool, model.classifier):
            hidden = part(hidden)
        assert torch.equal(hidden, model(images).logits)


def test_hooks_see_each_relu_once():
    model, seen = small_model(), []
    for name, part in model.named_modules():
        if isinstance(part, nn.ReLU):
            part.register_forward_hook(lambda module, args, output, name=name: seen.append(name))
    model(torch.randn(1, 3, 8, 8))
    assert seen == ["stem.relu", *(f"stages.{stage}.0.relu{index}" for stage in (0, 1) for index in (1, 2))]


def test_a_new_model_is_drawn_by_hes_rule():
    torch.manual_seed(0)
    model = CifarResNetForImageClassification(CifarResNetConfig(num_labels=10))
    weight = model.stages[2][1].conv1.weight.detach()  # 36,864 draws: the standard deviation is known to 0.4 %
    assert float(weight.std()) == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)
    norm = model.stages[2][1].norm1
    assert torch.equal(norm.weight, torch.ones(64))
    assert torch.equal(norm.running_var, torch.ones(64))


@pytest.mark.parametrize(
    "changes",
    [
        {"blocks_per_stage": 0},
        {"num_channels": 0},
        {"image_size": -1},
        {"stage_channels": []},
        {"stage_channels": [0, 2]},
        {"stage_channels": [16, 8]},
        {"stage_channels": [4, 7]},
    ],
)
def test_configs_that_no_network_has(changes, tmp_path):
    sentence = r"must be at least 1, and each stage .*; got .*; check config\.json"
    with pytest.raises(ModelError, match=sentence):
        CifarResNetConfig(**changes)
    content = CifarResNetConfig().to_dict() | changes
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match=r"cannot read .*config\.json \(model_type 'cifar_resnet'\)"):
        read_config(tmp_path)


def test_config_of_wrong_types(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "cifar_resnet", "stage_channels": "wide"}))
    with pytest.raises(ModelError, match=r"cannot read .*stage_channels"):
        read_config(tmp_path)
    assert AutoConfig.for_model("cifar_resnet").blocks_per_stage == 3


# ---------------------------------------------------------------------------------------------- what is refused
def without(name):
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


def with_one(name, tensor):
    return lambda tensors: tensors | {name: tensor}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (without("bn1.running_var"), r"lacks the tensor bn1\.running_var; give the weights of a CIFAR ResNet"),
        (without("layer2.1.conv2.weight"), r"lacks the tensor layer2\.1\.conv2\.weight"),
        (without("conv1.weight"), r"lacks the tensor conv1\.weight"),
        (without("linear.weight"), r"lacks the tensor linear\.weight"),
        (without("linear.bias"), r"lacks the tensor linear\.bias"),
        (without("layer1.0.conv1.weight"), r"lacks the tensor layer1\.0\.conv1\.weight"),
        (without("layer1.1.conv1.weight"), r"holds the tensor layer\S+, which the network does not have"),
        (lambda tensors: {}, "lacks the tensor linear"),
        (with_one("layer2.0.shortcut.0.weight", torch.zeros(8, 4, 1, 1)), r"holds the tensor layer2\.0\.shortcut\.0"),
        (with_one("layer1.2.conv1.weight", torch.zeros(4, 4, 3, 3)), r"lacks the tensor layer1\.2\.bn1\.weight"),
        (
            with_one("conv1.weight", torch.zeros(4, 3, 5, 5)),
            r"conv1\.weight in .* shape \(4, 3, 5, 5\), need \(4, 3, 3, 3\)",
        ),
        (with_one("conv1.weight", torch.zeros(())), r"conv1\.weight in .* has the shape \(\), too few sides"),
        (with_one("linear.bias", torch.zeros(9)), r"linear\.bias in .* has the shape \(9,\), need \(10,\)"),
        (with_one("layer3.0.bn1.weight", torch.zeros(8)), r"layer3\.0\.bn1\.weight in .*\(8,\), need \(12,\)"),
        (
            with_one("layer2.0.conv1.weight", torch.zeros(2, 4, 3, 3)),
            "holds no network that can be built: .* even number",
        ),
        (with_one("layer1.0.conv1.weight", torch.zeros(0, 4, 3, 3)), "holds no network that can be built"),
        (
            with_one("linear.bias", torch.zeros(10, dtype=torch.int8)),
            r"is of type torch\.int8, need one like torch\.float32",
        ),
        (
            with_one("bn1.num_batches_tracked", torch.zeros(())),
            r"is of type torch\.float32, need one like torch\.int64",
        ),
        (with_one("module.linear.bias", torch.zeros(10)), r"same name with and without 'module\.' in front; keep one"),
    ],
)
def test_bad_checkpoints(tmp_path, change, sentence):
    weights = saved_as(tmp_path, change(published()))
    with pytest.raises(CheckpointError, match=sentence):
        convert(weights, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == [weights.name]


def test_files_that_are_no_safetensors(tmp_path):
    weights = saved_as(tmp_path, published())
    weights.write_bytes(weights.read_bytes()[:-5])
    for path in (weights, tmp_path / "nowhere.safetensors"):
        with pytest.raises(CheckpointError, match=r"cannot be read as safetensors \(.*\); copy or download it again"):
            convert(path, tmp_path / "model")


def test_as_many_labels_as_logits(tmp_path):
    weights = saved_as(tmp_path, published(labels=100))
    with pytest.raises(RequestError, match="gives 100 logits, but there are 10 labels; pass one for each"):
        convert(weights, tmp_path / "model")


def test_nothing_is_replaced(tmp_path):
    weights = saved_as(tmp_path, published())
    (tmp_path / "model").mkdir()
    with pytest.raises(RequestError, match=r"model exists; choose another output"):
        convert(weights, tmp_path / "model")


def test_a_disk_that_is_full_leaves_nothing(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    weights = saved_as(tmp_path, published())
    monkeypatch.setattr(CifarResNetForImageClassification, "save_pretrained", full)
    with pytest.raises(OutputError, match=r"model could not be written \(.*No space.*\); free the disk"):
        convert(weights, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == [weights.name]


# ---------------------------------------------------------------------------------------------- the script
def run_script(monkeypatch, *arguments):
    spec = importlib.util.spec_from_file_location("make_cifar_resnet", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
    script.main()


def test_script(tmp_path, monkeypatch, capsys):
    weights = saved_as(tmp_path, published())
    run_script(monkeypatch, weights, tmp_path / "model")
    count = sum(tensor.numel() for name, tensor in published().items() if "running" not in name)
    assert capsys.readouterr().out == f"{tmp_path / 'model'}: {count:,} parameters\n"
    with pytest.raises(SystemExit):
        run_script(monkeypatch, weights, tmp_path / "model")
    assert "exists; choose another output" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- the published weights
@pytest.mark.slow
@pytest.mark.skipif(assets.VARIABLE not in os.environ, reason="needs the weights and images that BITMEND_ASSETS names")
def test_top1_of_the_published_network(tmp_path):
    model = convert(assets.path("resnet-cifar") / "resnet20.safetensors", tmp_path / "model")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "model", backend="pil")
    right = total = 0
    for images, labels in batches_of(assets.path("cifar10") / "test-3000.tar.gz", model.config.label2id, 250):
        pixels = processor(images, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            right += int((model(pixels).logits.argmax(-1) == torch.tensor(labels)).sum())
        total += len(labels)
    assert total == 3000
    assert 0.80 < right / total < 0.83


def batches_of(archive, label2id, size):
    with tarfile.open(archive) as tar:
        members = sorted((one for one in tar if one.isfile() and one.name.endswith(".jpg")), key=lambda one: one.name)
        pictures = [(Image.open(BytesIO(tar.extractfile(one).read())), Path(one.name).parent.name) for one in members]
    for start in range(0, len(pictures), size):
        part = pictures[start : start + size]
        yield [image.convert("RGB") for image, _ in part], [label2id[name] for _, name in part]
