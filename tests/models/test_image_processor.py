import json
import os

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from bitmend.errors import CalibrationError, CheckpointError, ModelError
from bitmend.models.image_processor import PixelsOf, load_processor

# Values 0..255 come out as they went in, so that a test can read them.
AS_THEY_ARE = {"do_rescale": False, "do_normalize": False}


def write(folder, *, name="preprocessor_config.json", **settings):
    content = {"image_processor_type": "ViTImageProcessor", "size": {"height": 2, "width": 2}} | settings
    (folder / name).write_text(json.dumps(content))
    return folder


def picture(rows):
    return Image.fromarray(np.array(rows, dtype=np.uint8))


def plain(value, size=(2, 2), mode="RGB"):
    return Image.new(mode, size, value)


# ------------------------------------------------------------------------------------------------- what comes out
def test_values_by_hand(tmp_path):
    processor = load_processor(write(tmp_path, image_mean=[0.5, 0.5, 0.4], image_std=[0.25, 0.5, 0.2]))
    pixels = processor([picture([[[51, 255, 0], [0, 0, 51]], [[255, 51, 255], [51, 51, 51]]])])
    # 51 / 255 = 0.2; red: (0.2 - 0.5) / 0.25 = -1.2, (0 - 0.5) / 0.25 = -2, (1 - 0.5) / 0.25 = 2; the others alike
    red, green, blue = [[-1.2, -2.0], [2.0, -1.2]], [[1.0, -1.0], [-0.6, -0.6]], [[-2.0, -1.0], [3.0, -1.0]]
    torch.testing.assert_close(pixels, torch.tensor([[red, green, blue]]), rtol=0, atol=1e-6)
    assert pixels.dtype == torch.float32
    assert processor.size == (3, 2, 2)


def test_a_crop_by_hand(tmp_path):
    settings = {"size": {"shortest_edge": 2}, "crop_size": {"height": 2, "width": 2}, "do_center_crop": True}
    write(tmp_path, image_processor_type="CLIPImageProcessor", **settings, **AS_THEY_ARE)
    processor = load_processor(tmp_path)
    columns = [[[column, 0, 0] for column in range(6)] for _ in range(2)]
    assert processor([picture(columns)])[0, 0].tolist() == [[2, 3], [2, 3]]
    assert processor.size == (3, 2, 2)


@pytest.mark.parametrize(
    ("name", "settings", "size"),
    [
        ("ViTImageProcessor", {"size": {"height": 8, "width": 6}}, (3, 8, 6)),
        ("ViTImageProcessorFast", {"size": 8}, (3, 8, 8)),
        (None, {"feature_extractor_type": "ViTFeatureExtractor", "size": 8}, (3, 8, 8)),
        ("DeiTImageProcessor", {"size": {"height": 9, "width": 9}, "crop_size": {"height": 8, "width": 8}}, (3, 8, 8)),
        ("CLIPImageProcessor", {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}, (3, 8, 8)),
        ("BitImageProcessor", {"size": {"shortest_edge": 9}, "crop_size": {"height": 8, "width": 8}}, (3, 8, 8)),
        ("ConvNextImageProcessor", {"size": {"shortest_edge": 8}, "crop_pct": 0.875}, (3, 8, 8)),
        ("BitImageProcessor", {"size": {"shortest_edge": 8}, "do_center_crop": False}, None),
        ("ViTImageProcessor", {"do_resize": False}, None),
    ],
)
def test_the_processors_of_the_usual_families(tmp_path, name, settings, size):
    processor = load_processor(write(tmp_path, image_processor_type=name, **settings))
    assert processor.size == size
    if size is not None:
        assert processor([plain("red", (7, 11)), plain("blue", (20, 5))]).shape == (2, *size)


def test_a_picture_does_not_change_with_what_is_beside_it(tmp_path):
    processor = load_processor(write(tmp_path, size={"height": 5, "width": 5}))
    draw = np.random.default_rng(0)
    pictures = [picture(draw.integers(0, 256, size=(height, 9, 3))) for height in (4, 9, 13)]
    together = processor(pictures)
    assert together.is_contiguous()
    for alone, pixels in zip(pictures, together, strict=True):
        assert torch.equal(processor([alone])[0], pixels)


# ------------------------------------------------------------------------------------------------------ all modes
def palette(transparent):
    image = Image.new("P", (2, 2), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    if transparent:
        image.info["transparency"] = 1
    return image


@pytest.mark.parametrize(
    ("image", "colour", "grey"),
    [
        (plain((200, 100, 50)), (200, 100, 50), 124),  # 0.299 * 200 + 0.587 * 100 + 0.114 * 50 = 124.2
        (plain(70, mode="L"), (70, 70, 70), 70),
        (plain(1, mode="1"), (255, 255, 255), 255),
        (plain((200, 100, 50, 255), mode="RGBA"), (200, 100, 50), 124),
        (plain((200, 100, 50, 0), mode="RGBA"), (255, 255, 255), 255),
        (plain((0, 0, 0, 51), mode="RGBA"), (204, 204, 204), 204),  # a fifth of black, the rest white
        (plain((70, 0), mode="LA"), (255, 255, 255), 255),
        (palette(transparent=False), (200, 100, 50), 124),
        (palette(transparent=True), (255, 255, 255), 255),
        (plain((55, 155, 205, 0), mode="CMYK"), (200, 100, 50), 124),
        (Image.fromarray(np.full((2, 2), 65535, dtype=np.uint16)), (255, 255, 255), 255),
        (Image.fromarray(np.full((2, 2), 300, dtype=np.uint16)), (1, 1, 1), 1),  # 300 / 257 = 1.17
        (Image.fromarray(np.full((2, 2), 32768, dtype=np.uint16)), (128, 128, 128), 128),
        (Image.fromarray(np.full((2, 2), 32768, dtype=np.int32)), (128, 128, 128), 128),
        (Image.fromarray(np.full((2, 2), -9, dtype=np.int32)), (0, 0, 0), 0),
    ],
)
def test_every_mode_becomes_that_of_the_model(tmp_path, image, colour, grey):
    write(tmp_path, **AS_THEY_ARE)
    assert load_processor(tmp_path)([image])[0, :, 0, 0].tolist() == list(colour)
    assert load_processor(tmp_path, channels=1)([image])[0, :, 1, 1].tolist() == [grey]


def test_a_grey_model_normalises_one_channel(tmp_path):
    processor = load_processor(write(tmp_path, image_mean=[0.2], image_std=[0.4], do_convert_rgb=True), channels=1)
    assert processor.size == (1, 2, 2)
    assert processor([plain("white")])[0, 0, 0, 0].item() == pytest.approx((1 - 0.2) / 0.4, abs=1e-6)


# -------------------------------------------------------------------------------------------------- what is refused
def test_pictures_of_several_sizes_need_a_processor_that_resizes(tmp_path):
    processor = load_processor(write(tmp_path, do_resize=False))
    assert processor([plain("red", (3, 4)), plain("blue", (3, 4))]).shape == (2, 3, 4, 3)
    sentence = (
        r"at one size, but picture 1 comes out as \(3, 5, 3\) and the first as \(3, 4, 3\); give pictures of one size"
    )
    with pytest.raises(CalibrationError, match=sentence):
        processor([plain("red", (3, 4)), plain("blue", (3, 5))])
    with pytest.raises(CalibrationError, match="at least one picture is required, but none came"):
        processor([])


def test_a_picture_that_the_processor_refuses_is_named(tmp_path):
    def refuse(**options):
        raise ValueError("absolute aspect ratio\nmust be smaller")

    processor = PixelsOf(refuse, 3, tmp_path, None)
    sentence = (
        r"failed on picture 0 of 2, 9 x 1 in mode L \(absolute aspect ratio must be smaller\); leave the picture out"
    )
    with pytest.raises(CalibrationError, match=sentence):
        processor([plain(0, (9, 1), "L")] * 2)


def test_a_folder_without_a_processor(tmp_path):
    (tmp_path / "processor_config.json").write_text('{"processor_class": "CLIPProcessor"}')
    with pytest.raises(
        ModelError, match=r"has no preprocessor_config.json, which says how .* copy that of the original"
    ):
        load_processor(tmp_path)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", r"preprocessor_config.json is not readable JSON \(.*\); copy it again"),
        ("[1]", "holds a list, need a JSON object"),
        ('{"size": 8}', r"could not be loaded \(.+\); copy the file of the original model"),
        (
            '{"image_processor_type": "NoSuchImageProcessor"}',
            r"could not be loaded \(.+\); copy the file of the original",
        ),
        (
            '{"image_processor_type": "ViTModel"}',
            "must name an image processor of transformers, .* but it is 'ViTModel'",
        ),
        ('{"image_processor_type": 3}', "must name an image processor of transformers, .* but it is 3"),
        ('{"image_processor_type": "Wav2Vec2FeatureExtractor"}', "image processor"),
    ],
)
def test_a_file_that_names_no_processor(tmp_path, content, sentence):
    (tmp_path / "preprocessor_config.json").write_text(content)
    with pytest.raises(ModelError, match=sentence) as caught:
        load_processor(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"size": {"height": 2, "width": 10**6}},
            "asks for size = .*1000000.*, edges of 1 to 4096 pixels can be meant",
        ),
        ({"size": 0}, "asks for size = 0, edges of 1 to 4096"),
        ({"size": 1e300}, "asks for size = 1e.300, edges of 1 to 4096"),
        ({"do_center_crop": True, "crop_size": [8, 5000]}, "asks for crop_size = .8, 5000., edges"),
        ({"crop_pct": 1e-9}, "asks for crop_pct = 1e-09, a share of 0.1 to 1 can be meant"),
        ({"image_std": [0.0, 1.0, 1.0]}, "image_std must be above 0 .* comes out as NaN or infinite"),
        (
            {"image_mean": [0.5]},
            r"for 3 channels is required, but it fails on a grey picture \(mean must have 3 elements",
        ),
        ({"size": {"longest": 3}}, "image processor"),
    ],
)
def test_settings_that_cannot_work(tmp_path, settings, sentence):
    with pytest.raises(ModelError, match=sentence):
        load_processor(write(tmp_path, **settings))


def test_means_for_colours_do_not_fit_a_grey_model(tmp_path):
    with pytest.raises(
        ModelError, match=r"for 1 channels is required, but it fails on a grey picture \(mean must have 1"
    ):
        load_processor(write(tmp_path), channels=1)
    with pytest.raises(ModelError, match=r"1 \(grey\) or 3 \(colour\) channels is required, but its num_channels is 4"):
        load_processor(write(tmp_path), channels=4)


def test_code_that_comes_with_a_model_never_runs(tmp_path):
    marker = tmp_path / "ran"
    (tmp_path / "mine.py").write_text(f"open({str(marker)!r}, 'w')\nclass MineImageProcessor: ...\n")
    write(
        tmp_path, image_processor_type="MineImageProcessor", auto_map={"AutoImageProcessor": "mine.MineImageProcessor"}
    )
    with pytest.raises(ModelError, match=r"could not be loaded \(.+\)"):
        load_processor(tmp_path)
    assert not marker.exists()


def test_a_pipe_in_the_folder_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "preprocessor_config.json")
    with pytest.raises(CheckpointError, match="is a pipe or a device and no file"):
        load_processor(tmp_path)


# ------------------------------------------------------------------------------------------------------ the surroundings
def test_the_file_of_models_that_also_read_text_comes_first(tmp_path):
    settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": 4, "width": 4}}
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    assert load_processor(tmp_path).size == (3, 4, 4)
    write(tmp_path)
    assert load_processor(tmp_path).size == (3, 4, 4)
    (tmp_path / "processor_config.json").write_text('{"processor_class": "CLIPProcessor"}')
    assert load_processor(tmp_path).size == (3, 2, 2)


def test_transformers_is_as_talkative_as_before(tmp_path, capfd):
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_info()
    try:
        load_processor(write(tmp_path))([plain("black")])
        assert transformers.logging.get_verbosity() == transformers.logging.INFO
    finally:
        transformers.logging.set_verbosity(before)
    assert capfd.readouterr() == ("", "")
