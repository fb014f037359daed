"""Runs of encoders: texts of their own lengths as rows, either tower of a model with two, and what their folders hold."""

import json
import random
import shutil

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import bitmend
from bitmend.calibrate.data import load_calibration
from bitmend.errors import RecipeError
from bitmend.pipeline.run import check_request, quantize

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
KEYS = {"weights.bits": 3, "weights.group_size": -1, "calibration.sequences": 12}


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("texts") / "lines.txt"
    texts = (" ".join(f"w{draw.randrange(3, 60)}" for _ in range(draw.randrange(2, 12))) for _ in range(40))
    path.write_text("\n".join(texts))
    return path


@pytest.fixture(scope="module")
def bert(tmp_path_factory, tiny):
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=61, max_position_embeddings=32, initializer_range=0.2, **SIZES)
    return tiny.save(tmp_path_factory.mktemp("models") / "bert", transformers.BertModel(config))


@pytest.fixture(scope="module")
def clip(tmp_path_factory, tiny):
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config=SIZES | {"vocab_size": 61, "eos_token_id": 2, "bos_token_id": 1, "max_position_embeddings": 32},
        vision_config=SIZES | {"image_size": 8, "patch_size": 4},
        projection_dim=12,
    )
    folder = tiny.save(tmp_path_factory.mktemp("models") / "clip", transformers.CLIPModel(config))
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    noise = np.random.default_rng(0)
    for name in ("left", "right"):
        (folder / name).mkdir()
        for number in range(10):
            Image.fromarray(noise.integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(folder / name / f"{number}.png")
    return folder


def test_the_error_told_is_that_of_the_loaded_model_on_the_held_out_texts(bert, lines, tmp_path):
    report = quantize(bert, "gptq", [lines], output=tmp_path / "out", overrides=KEYS)
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert)
    rows = load_calibration(
        [lines], tokenizer, sequences=12, sequence_length=32, held_out=0.25, seed=0, whole_texts=True
    )
    assert report.calibration["sha256"] == rows.fingerprint
    whole, packed = transformers.AutoModel.from_pretrained(bert), bitmend.load(tmp_path / "out")
    error = energy = 0.0
    for row, held_out in zip(rows.rows, rows.held_out.tolist(), strict=True):
        if held_out:
            with torch.no_grad():  # each text by itself: padding must have had no part
                full, found = (
                    model(input_ids=row.unsqueeze(0)).last_hidden_state.double() for model in (whole, packed)
                )
            error += float((full - found).square().sum())
            energy += float(full.square().sum())
    assert report.blocks[-1].relative_error == pytest.approx(error / energy, rel=1e-4)
    assert report.blocks[-1].relative_error > 1e-4


@pytest.mark.parametrize("solver", ["rtn", "gptaq", "marr"])
def test_padding_has_no_part_where_activations_are_rounded(bert, lines, tmp_path, solver):
    report = quantize(bert, solver, [lines], output=tmp_path / "out", overrides=KEYS | {"activations.bits": 6})
    assert 0 < report.blocks[-1].relative_error < 0.5
    one = {"input_ids": torch.tensor([[5, 6, 7]])}
    padded = {"input_ids": torch.tensor([[5, 6, 7, 0, 0]]), "attention_mask": torch.tensor([[1, 1, 1, 0, 0]])}
    model = bitmend.load(tmp_path / "out")
    with torch.no_grad():
        alone, beside = model(**one).last_hidden_state, model(**padded).last_hidden_state[:, :3]
    assert torch.allclose(alone, beside, atol=1e-5)


def test_static_ranges_over_padded_texts_are_refused(bert, lines, tmp_path):
    keys = KEYS | {"attention.static": True, "attention.key_bits": 6}
    with pytest.raises(RecipeError, match="an observer of activations needs rows without padding"):
        quantize(bert, "gptq", [lines], output=tmp_path / "out", overrides=keys)
    assert not (tmp_path / "out").exists()


def test_each_tower_becomes_a_model_that_loads_by_itself(clip, lines, pictures, tmp_path):
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[1, 5, 6, 2], [1, 7, 8, 2]])
    whole = transformers.CLIPModel.from_pretrained(clip)
    with torch.no_grad():
        of_text, of_pixels = whole.get_text_features(input_ids=ids), whole.get_image_features(pixel_values=pixels)
    for tower, source, call, expected in (
        ("text", lines, {"input_ids": ids}, of_text),
        ("vision", pictures, {"pixel_values": pixels}, of_pixels),
    ):
        output = tmp_path / tower
        report = quantize(clip, "gptq", [source], output=output, tower=tower, overrides=KEYS | {"weights.bits": 8})
        config = json.loads((output / "config.json").read_text())
        assert config["architectures"] == [f"CLIP{tower.capitalize()}ModelWithProjection"]
        assert report.tower == json.loads((output / "run.json").read_text())["tower"] == tower
        model = getattr(transformers, config["architectures"][0]).from_pretrained(output)
        with torch.no_grad():
            found = model(**call)[f"{'image' if tower == 'vision' else 'text'}_embeds"]
        expected = getattr(expected, "pooler_output", expected)
        assert torch.nn.functional.cosine_similarity(found, expected).min() > 0.999
        assert not torch.equal(found, expected)
        assert config["architectures"][0] in (output / "README.md").read_text()


def test_a_run_of_one_tower_is_not_gone_on_with_as_the_other(clip, lines, pictures, tmp_path):
    keys = {"weights.bits": 8, "weights.group_size": -1}
    quantize(clip, "rtn", [], output=tmp_path / "out", tower="text", overrides=keys)
    with pytest.raises(bitmend.errors.ResumeError, match="model"):
        quantize(clip, "rtn", [], output=tmp_path / "out", tower="vision", overrides=keys, resume=True)
    named = check_request(clip, "rtn", [], tower="vision", overrides=keys)
    assert named.name == "clip-vision-rtn"


def test_the_first_layer_and_the_head_of_the_vision_tower_have_8_bits(clip, pictures, tmp_path):
    quantize(clip, "rtn", [pictures], output=tmp_path / "out", tower="vision", overrides=KEYS)
    quantization = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    schemes, modules = quantization["schemes"], quantization["modules"]
    bits = {name: schemes[entry["scheme"]]["bits"] for name, entry in modules.items()}
    assert bits["vision_model.embeddings.patch_embedding"] == bits["visual_projection"] == 8
    assert bits["vision_model.encoder.layers.0.mlp.fc1"] == 3


def test_how_sentence_transformers_pools_is_taken_over(bert, lines, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(bert, source)
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    (source / "2_Normalize").mkdir()
    (source / "modules.json").write_text("[]")
    quantize(source, "rtn", [], output=tmp_path / "out", overrides={"weights.bits": 8, "weights.group_size": -1})
    assert (tmp_path / "out" / "1_Pooling" / "config.json").read_text() == '{"pooling_mode_cls_token": true}'
    assert (tmp_path / "out" / "modules.json").is_file()


def test_an_embedding_table_is_quantised_where_there_is_no_head(bert, lines, tmp_path):
    quantize(bert, "rtn", [lines], output=tmp_path / "out", overrides=KEYS | {"embedding.bits": 8})
    loaded = bitmend.load(tmp_path / "out")
    whole = transformers.AutoModel.from_pretrained(bert)
    ids = torch.arange(61).unsqueeze(0)
    found, expected = (model.embeddings.word_embeddings(ids) for model in (loaded, whole))
    assert 0 < (found - expected).abs().max() < expected.abs().max() / 100
    with pytest.raises(RecipeError, match="no layer behind its blocks that makes its answer; leave head out"):
        check_request(bert, "rtn", [lines], overrides=KEYS | {"head.bits": 8})


def test_a_prefix_is_for_decoders(bert, lines):
    with pytest.raises(RecipeError, match="a prefix stands in front of what a decoder reads, and the model is none"):
        check_request(bert, "gptq", [lines], overrides=KEYS | {"prefix.tokens": [5]})


def test_maps_beside_the_blocks_of_an_encoder(bert, lines, tmp_path):
    """Padding has no part in what is fitted, and none in what is judged: the error told is that of each text by itself."""
    method = {"name": "qwt", "structure": "full", "gate": "in_sample"}
    keys = KEYS | {"compensators": [method]}
    report = quantize(bert, "rtn", [lines], output=tmp_path / "out", overrides=keys)
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert)
    rows = load_calibration(
        [lines], tokenizer, sequences=12, sequence_length=32, held_out=0.25, seed=0, whole_texts=True
    )
    whole, packed = transformers.AutoModel.from_pretrained(bert), bitmend.load(tmp_path / "out")
    assert packed.encoder.layer[0].compensation.weight.shape == (16, 16)
    error = energy = 0.0
    for row, held_out in zip(rows.rows, rows.held_out.tolist(), strict=True):
        if held_out:
            with torch.no_grad():
                full, found = (
                    model(input_ids=row.unsqueeze(0)).last_hidden_state.double() for model in (whole, packed)
                )
            error += float((full - found).square().sum())
            energy += float(full.square().sum())
    assert report.blocks[-1].relative_error == pytest.approx(error / energy, rel=1e-4)


def test_maps_beside_the_blocks_of_both_towers(clip, lines, pictures, tmp_path):
    keys = KEYS | {"compensators": [{"name": "qwt", "structure": "bias", "gate": "in_sample"}]}
    bitmend.quantize(clip, "rtn", [lines, pictures], output=tmp_path / "out", overrides=keys)
    model = transformers.CLIPModel.from_pretrained(tmp_path / "out")
    for tower in (model.text_model, model.vision_model):
        assert all(hasattr(layer, "compensation") for layer in tower.encoder.layers)
    described = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert len(described["compensations"]) == 4
