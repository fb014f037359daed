import numpy as np
import pytest
import torch
from PIL import Image

from bitmend.calibrate.images import ImageSet
from bitmend.errors import RequestError
from bitmend.models.find import find_adapter
from bitmend.pipeline.calibration_rows import batches_of, draw_calibration, expected_batches, row_length
from bitmend.pipeline.plan import MOST_ROWS_PER_BATCH
from bitmend.pipeline.recipe import load_recipe
from bitmend.protocols import SilentProgress


class Recording(SilentProgress):
    def __init__(self):
        self.lines = []

    def say(self, line):
        self.lines.append(line)


@pytest.fixture
def resnet(tmp_path):
    from bitmend.models.cifar_resnet import CifarResNetConfig, CifarResNetForImageClassification

    config = CifarResNetConfig(
        blocks_per_stage=1, stage_channels=[2, 2, 2], image_size=8, id2label={0: "cat", 1: "dog"}
    )
    CifarResNetForImageClassification(config).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "preprocessor_config.json").write_text(
        '{"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}}'
    )
    for name in ("cat", "dog"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for number in range(4):
            colours = np.full((8, 8, 3), 10 * number + (name == "cat"), dtype=np.uint8)
            Image.fromarray(colours).save(tmp_path / "pictures" / name / f"{number}.png")
    return find_adapter(tmp_path / "model"), tmp_path / "pictures"


def test_pictures_are_drawn_and_told(resnet):
    adapter, folder = resnet
    shown = Recording()
    rows = draw_calibration(load_recipe("gptq", {"calibration.sequences": 6}), adapter, [folder], shown)
    assert isinstance(rows, ImageSet)
    assert rows.pixels.shape == (6, 3, 8, 8)
    assert rows.num_held_out == 2
    assert shown.lines == [f"calibration: 6 pictures, 2 held out, sha256 {rows.fingerprint[:12]}"]
    assert draw_calibration(load_recipe("gptq"), adapter, rows, shown) is rows


def test_each_batch_is_of_one_split(resnet):
    adapter, folder = resnet
    rows = draw_calibration(load_recipe("gptq", {"calibration.sequences": 8}), adapter, [folder], SilentProgress())
    batches = batches_of(rows, adapter)
    assert [(batch.num_rows, held_out) for batch, held_out in batches] == [(6, False), (2, True)]
    assert torch.equal(batches[0][0].pixels, rows.pixels[~rows.held_out])
    assert batches_of(None, adapter) == []


def test_what_is_expected_has_the_shapes_of_what_comes(resnet, tiny_model):
    adapter, folder = resnet
    recipe = load_recipe("gptq", {"calibration.sequences": 8})
    rows = draw_calibration(recipe, adapter, [folder], SilentProgress())
    drawn = [(batch.num_rows, held_out) for batch, held_out in batches_of(rows, adapter)]
    assert [(shape.rows, shape.held_out) for shape in expected_batches(recipe, adapter)] == drawn
    many = load_recipe("gptq", {"calibration.sequences": 1000})
    assert max(shape.rows for shape in expected_batches(many, adapter)) == MOST_ROWS_PER_BATCH
    texts = load_recipe("gptq", {"calibration.sequences": 8, "calibration.sequence_length": 12})
    assert sum(shape.tokens for shape in expected_batches(texts, find_adapter(tiny_model))) == 96


def test_rows_of_the_other_kind_are_refused(resnet, tiny_model, tiny_text):
    adapter, folder = resnet
    recipe = load_recipe("gptq", {"calibration.sequences": 4, "calibration.sequence_length": 12})
    texts = draw_calibration(recipe, find_adapter(tiny_model), [tiny_text], SilentProgress())
    with pytest.raises(RequestError, match="reads pictures, but tokens came"):
        draw_calibration(load_recipe("gptq"), adapter, texts, SilentProgress())
    pictures = draw_calibration(load_recipe("gptq", {"calibration.sequences": 4}), adapter, [folder], SilentProgress())
    with pytest.raises(RequestError, match="reads tokens, but pictures came"):
        draw_calibration(recipe, find_adapter(tiny_model), pictures, SilentProgress())
    with pytest.raises(RequestError, match="pictures have no sequence_length"):
        draw_calibration(recipe, adapter, [folder], SilentProgress())


def test_a_row_is_as_long_as_the_context_at_most(tiny_model):
    adapter = find_adapter(tiny_model)
    assert row_length(load_recipe("gptq"), adapter) == 64
    assert row_length(load_recipe("gptq", {"prefix.max_tokens": 4}), adapter) == 60
    with pytest.raises(RequestError, match="at most the model's context of 64 tokens; got 65"):
        row_length(load_recipe("gptq", {"calibration.sequence_length": 65}), adapter)
