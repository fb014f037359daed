"""A model with two towers in one command: both are what a run of each by itself gives, and a stopped run goes on."""

import json
import random
import shutil

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file

import bitmend
from bitmend.calibrate.images import ImageSet
from bitmend.errors import CalibrationError, RequestError, ResumeError
from bitmend.pipeline import run
from bitmend.pipeline.recipe import load_recipe
from bitmend.pipeline.towers import quantize, sources_of_towers

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
KEYS = {"weights.bits": 3, "weights.group_size": -1, "calibration.sequences": 8}


@pytest.fixture(scope="module")
def clip(tmp_path_factory, tiny):
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config=SIZES | {"vocab_size": 61, "eos_token_id": 2, "bos_token_id": 1, "max_position_embeddings": 32},
        vision_config=SIZES | {"image_size": 8, "patch_size": 4},
        projection_dim=12,
        logit_scale_init_value=3.5,
    )
    folder = tiny.save(tmp_path_factory.mktemp("models") / "clip", transformers.CLIPModel(config))
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A folder of pictures and a file of texts."""
    folder, draw, noise = tmp_path_factory.mktemp("sources"), random.Random(0), np.random.default_rng(0)
    lines = (" ".join(f"w{draw.randrange(3, 60)}" for _ in range(draw.randrange(2, 12))) for _ in range(30))
    (folder / "lines.txt").write_text("\n".join(lines))
    (folder / "pictures").mkdir()
    for number in range(12):
        picture = Image.fromarray(noise.integers(0, 256, (9, 9, 3), dtype=np.uint8))
        picture.save(folder / "pictures" / f"{number}.png")
    return [folder / "pictures", folder / "lines.txt"]


def tensors(folder):
    return load_file(folder / "model.safetensors")


def test_both_towers_are_those_of_runs_of_their_own(clip, sources, tmp_path):
    report = quantize(clip, "gptq", sources, output=tmp_path / "both", overrides=KEYS)
    assert not (tmp_path / "both.towers").exists()
    parts = {}
    for tower, source in zip(("vision", "text"), sources, strict=True):
        run.quantize(clip, "gptq", [source], output=tmp_path / tower, tower=tower, overrides=KEYS)
        parts |= tensors(tmp_path / tower)
    whole = tensors(tmp_path / "both")
    assert set(whole) == set(parts) | {"logit_scale"}
    assert all(torch.equal(whole[name], tensor) for name, tensor in parts.items())
    assert float(whole["logit_scale"]) == 3.5
    assert len(report.blocks) == 6  # embedding, norm, two layers; two layers
    account = bitmend.ledger(tmp_path / "both")
    assert report.bits["quantised_layers"] == account.bits_per_weight
    assert set(report.calibration) == {"vision", "text"}


def test_the_whole_model_loads_and_gives_what_its_towers_give(clip, sources, tmp_path):
    quantize(clip, "rtn", sources, output=tmp_path / "both", overrides=KEYS)
    both = transformers.CLIPModel.from_pretrained(tmp_path / "both")
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[1, 5, 6, 2], [1, 7, 8, 2]])
    for tower, call, source in (
        ("vision", {"pixel_values": pixels}, sources[0]),
        ("text", {"input_ids": ids}, sources[1]),
    ):
        run.quantize(clip, "rtn", [source], output=tmp_path / tower, tower=tower, overrides=KEYS)
        alone = bitmend.load(tmp_path / tower)
        with torch.no_grad():
            found = both.get_image_features(**call) if tower == "vision" else both.get_text_features(**call)
            expected = alone(**call)[f"{'image' if tower == 'vision' else 'text'}_embeds"]
        assert torch.equal(getattr(found, "pooler_output", found), expected)


def test_a_run_that_is_stopped_in_the_second_tower_goes_on_there(clip, sources, tmp_path, monkeypatch):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    quantize(clip, "gptq", sources, output=straight, overrides=KEYS)
    honest, called = run.quantize, []

    def stopping(*arguments, tower, **options):
        called.append(tower)
        if tower == "text" and len(called) == 2:
            raise KeyboardInterrupt
        return honest(*arguments, tower=tower, **options)

    monkeypatch.setattr(run, "quantize", stopping)
    with pytest.raises(KeyboardInterrupt):
        quantize(clip, "gptq", sources, output=broken, overrides=KEYS)
    assert not broken.exists()
    quantize(clip, "gptq", sources, output=broken, overrides=KEYS, resume=True)
    assert called == ["vision", "text", "vision", "text"]
    first, second = tensors(straight), tensors(broken)
    assert all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(ResumeError, match="is finished, so that there is nothing to go on with; pass --overwrite"):
        quantize(clip, "gptq", sources, output=broken, overrides=KEYS, resume=True)
    quantize(clip, "gptq", sources, output=broken, overrides=KEYS, overwrite=True)


def test_a_finished_tower_is_not_run_again(clip, sources, tmp_path, monkeypatch):
    honest, solved = run.quantise_blocks, []

    def counting(adapter, *arguments, **options):
        solved.append(adapter.tower)
        if solved == ["vision", "text"]:
            raise KeyboardInterrupt
        return honest(adapter, *arguments, **options)

    monkeypatch.setattr(run, "quantise_blocks", counting)
    with pytest.raises(KeyboardInterrupt):
        quantize(clip, "gptq", sources, output=tmp_path / "out", overrides=KEYS)
    with pytest.raises(RequestError, match=r"out\.towers holds a stopped run; pass --resume to go on with it, or"):
        quantize(clip, "gptq", sources, output=tmp_path / "out", overrides=KEYS)
    quantize(clip, "gptq", sources, output=tmp_path / "out", overrides=KEYS, resume=True)
    assert solved == ["vision", "text", "text"]
    assert not (tmp_path / "out.towers").exists()


def test_what_is_not_ours_is_never_touched(clip, tmp_path):
    keys = {"weights.bits": 8, "weights.group_size": -1}
    (tmp_path / "out.towers").mkdir()
    (tmp_path / "out.towers" / "thesis.txt").write_text("mine")
    for options in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(RequestError, match=r"out\.towers is where both runs would work, but holds something else"):
            quantize(clip, "rtn", output=tmp_path / "out", overrides=keys, **options)
    assert (tmp_path / "out.towers" / "thesis.txt").read_text() == "mine"
    (tmp_path / "model.towers").mkdir()
    shutil.copytree(clip, tmp_path / "model.towers" / "vision")
    with pytest.raises(RequestError, match=r"lies in .*model\.towers, where both runs would work"):
        quantize(tmp_path / "model.towers" / "vision", "rtn", output=tmp_path / "model", overrides=keys)
    assert (tmp_path / "model.towers" / "vision" / "config.json").is_file()


def test_files_beside_the_runs_stay_when_they_are_done(clip, sources, tmp_path):
    work = tmp_path / "out.towers"
    work.mkdir()
    (work / "towers.json").write_text('{"replaces_output": false}')
    (work / "note.txt").write_text("mine")
    quantize(clip, "rtn", sources, output=tmp_path / "out", overrides=KEYS, resume=True)
    assert [path.name for path in work.iterdir()] == ["note.txt"]


def test_both_towers_are_checked_before_the_first_runs(clip, sources, tmp_path):
    with pytest.raises(CalibrationError, match="captoins"):
        quantize(clip, "gptq", [sources[0], tmp_path / "captoins.txt"], output=tmp_path / "out", overrides=KEYS)
    assert not any(tmp_path.iterdir())
    quantize(clip, "gptq", sources, output=tmp_path / "out", overrides=KEYS)


def test_a_resumed_run_replaces_only_what_it_was_asked_to(clip, sources, tmp_path, monkeypatch):
    honest = run.quantise_blocks

    def stopping(adapter, *arguments, **options):
        if adapter.tower == "text":
            raise KeyboardInterrupt
        return honest(adapter, *arguments, **options)

    monkeypatch.setattr(run, "quantise_blocks", stopping)
    with pytest.raises(KeyboardInterrupt):
        quantize(clip, "gptq", sources, output=tmp_path / "out", overrides=KEYS)
    monkeypatch.undo()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")  # somebody else's model, made meanwhile
    with pytest.raises(RequestError, match="exists"):
        quantize(clip, "gptq", sources, output=tmp_path / "out", overrides=KEYS, resume=True)
    assert (tmp_path / "out" / "config.json").read_text() == "{}"


def test_what_is_said_of_each_tower_is_its_own(clip, sources, tmp_path):
    keys = KEYS | {"calibration.sequence_length": 6, "embedding.bits": 8}
    quantize(clip, "gptq", sources, output=tmp_path / "out", overrides=keys)
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    vision, text = record["recipe"]["vision"], record["recipe"]["text"]
    assert vision["head"]["bits"] == 8
    assert "head" not in text
    assert text["embedding"]["bits"] == 8
    assert "embedding" not in vision
    assert record["calibration"]["text"]["longest_sequence"] == 6
    modules = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["modules"]
    assert "text_model.embeddings.token_embedding" in modules


def test_each_source_goes_to_the_tower_that_reads_it(sources):
    plan = load_recipe("gptq")
    found = sources_of_towers(plan, [sources[1], "hf:a/b", "more.TAR.gz", sources[0], "rows.npz", "lines.jsonl.gz"])
    assert found["vision"] == ["more.TAR.gz", sources[0], "rows.npz"]
    assert found["text"] == [sources[1], "hf:a/b", "lines.jsonl.gz"]


@pytest.mark.parametrize(
    ("kept", "message"), [(0, "but no text came"), (1, "but no folder or archive of pictures came")]
)
def test_a_tower_without_its_source_is_told(clip, sources, tmp_path, kept, message):
    with pytest.raises(RequestError, match=message):
        quantize(clip, "gptq", [sources[kept]], output=tmp_path / "out", overrides=KEYS)
    assert not any(tmp_path.iterdir())


def test_rows_of_one_kind_are_refused_and_rounding_to_nearest_needs_none(clip, tmp_path):
    rows = ImageSet(torch.zeros(4, 3, 8, 8), torch.tensor([False, False, True, False]))
    with pytest.raises(RequestError, match="needs pictures and texts, but rows of one kind came"):
        quantize(clip, "gptq", rows, output=tmp_path / "out", overrides=KEYS)
    quantize(clip, "rtn", output=tmp_path / "out", overrides={"weights.bits": 8, "weights.group_size": -1})
    assert type(bitmend.load(tmp_path / "out")).__name__ == "CLIPModel"


def test_other_models_are_run_as_they_are(tiny_model, tiny_text, tmp_path):
    keys = {"weights.bits": 4, "weights.group_size": 8, "calibration.sequences": 4, "calibration.sequence_length": 8}
    quantize(tiny_model, "gptq", [tiny_text], output=tmp_path / "one", overrides=keys)
    run.quantize(tiny_model, "gptq", [tiny_text], output=tmp_path / "other", overrides=keys)
    first, second = tensors(tmp_path / "one"), tensors(tmp_path / "other")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_quantize_is_the_public_name():
    assert bitmend.quantize is quantize
