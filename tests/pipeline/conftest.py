"""Runs of the whole pipeline on tiny models."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import nn

from bitmend.models.cifar_resnet import CifarResNetConfig, CifarResNetForImageClassification
from bitmend.pipeline.resume import Journal
from bitmend.pipeline.run import quantize

KEYS = {
    "weights.group_size": 8,
    "weights.observer": "minmax",
    "calibration.sequences": 8,
    "calibration.sequence_length": 12,
}


@pytest.fixture
def run_tiny(tmp_path: Path, tiny_model: Path, tiny_text: Path) -> Any:
    """Return a function that quantises a folder (the tiny llama unless given) into `output` and gives the report."""

    def run(output="out", model=None, recipe="gptq", keys=None, calibration=None, **options):
        texts = [tiny_text] if calibration is None else calibration
        overrides = {**KEYS, **(keys or {})}
        return quantize(model or tiny_model, recipe, texts, output=tmp_path / output, overrides=overrides, **options)

    return run


@pytest.fixture
def interrupted(run_tiny: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that starts a run and presses Ctrl-C after its k-th site."""

    def start(k, output, **request):
        seen = []

        def keep_and_stop(journal, solved, real=Journal.keep_site):
            real(journal, solved)
            seen.append(solved.site.name)
            if len(seen) == k:
                raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(Journal, "keep_site", keep_and_stop)
            with pytest.raises(KeyboardInterrupt):
                run_tiny(output=output, **request)

    return start


@pytest.fixture
def ends_alike(run_tiny: Any, interrupted: Any, tmp_path: Path) -> Any:
    """Return a function that stops a run after its k-th site, goes on, and compares the files with those of a whole run."""

    def compare(k, *, whole="whole", output="out", **request):
        if not (tmp_path / whole).exists():
            run_tiny(whole, **request)
        interrupted(k, output, **request)
        run_tiny(output, resume=True, **request)
        for name in ("model.safetensors", "config.json"):
            assert (tmp_path / output / name).read_bytes() == (tmp_path / whole / name).read_bytes(), name

    return compare


PICTURE_LABELS = {0: "cat", 1: "dog", 2: "fish"}


def _save_for_pictures(model: Any, folder: Path, size: int) -> Path:
    model.save_pretrained(folder)
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": size, "width": size},
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.25, 0.25, 0.25],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.fixture(scope="session")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny vision transformer; read only."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        image_size=8,
        patch_size=4,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        id2label=PICTURE_LABELS,
    )
    model = transformers.ViTForImageClassification(config)
    with torch.no_grad():
        for part in model.modules():
            if isinstance(part, nn.Linear):
                part.weight.mul_(8)
    return _save_for_pictures(model, tmp_path_factory.mktemp("models") / "vit", 8)


@pytest.fixture(scope="session")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny residual network; read only."""
    torch.manual_seed(0)
    config = CifarResNetConfig(blocks_per_stage=1, stage_channels=[4, 8, 8], image_size=8, id2label=PICTURE_LABELS)
    model = CifarResNetForImageClassification(config)
    with torch.no_grad():
        for part in model.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.running_mean.normal_(0, 0.1)
                part.running_var.uniform_(0.5, 2)
    return _save_for_pictures(model, tmp_path_factory.mktemp("models") / "resnet", 8)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 pictures of noise in three class folders."""
    folder, draw = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name in PICTURE_LABELS.values():
        (folder / name).mkdir()
        for number in range(8):
            Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture
def save_for_pictures() -> Any:
    """Return a function that saves a model with the processor of its pictures."""
    return _save_for_pictures
