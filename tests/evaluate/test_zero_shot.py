import math

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from bitmend.errors import RequestError
from bitmend.evaluate.evaluate import evaluate
from bitmend.evaluate.load import LoadedModel
from bitmend.evaluate.zero_shot import SCALE, ZeroShot, class_embeddings, read_zero_shot, zero_shot_classifier
from bitmend.models.image_processor import load_processor
from bitmend.protocols import SilentProgress

QUIET = SilentProgress()


class Sight(nn.Module):
    """Embeds a picture as (its mean, 1)."""

    def __init__(self, turned=False):
        super().__init__()
        self.turned = turned
        self.config = transformers.CLIPVisionConfig(projection_dim=2)
        self.device, self.dtype = torch.device("cpu"), torch.float32

    def forward(self, pixel_values):
        mean = pixel_values.mean((1, 2, 3)) * (-1 if self.turned else 1)
        return {"image_embeds": torch.stack([mean, torch.ones_like(mean)], dim=1)}


class Speech(nn.Module):
    """Embeds a text as (the number of its last word - 10, 1)."""

    def __init__(self, features=2):
        super().__init__()
        self.features = features
        self.config = transformers.CLIPTextConfig(max_position_embeddings=8)
        self.device, self.dtype = torch.device("cpu"), torch.float32

    def forward(self, input_ids, attention_mask):
        last = input_ids.gather(1, attention_mask.sum(1, keepdim=True) - 1).float() - 10
        return BaseModelOutput(last_hidden_state=None) | {
            "text_embeds": torch.cat([last, *[torch.ones_like(last)] * (self.features - 1)], dim=1)
        }


@pytest.fixture
def processor(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(
        '{"image_processor_type": "ViTImageProcessor", "size": {"height": 4, "width": 4},'
        ' "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}'
    )
    return load_processor(tmp_path)


@pytest.fixture
def sight(processor):
    return LoadedModel("sight", Sight().eval(), None, processor, "embeddings")


@pytest.fixture
def speech(tiny):
    return LoadedModel("speech", Speech().eval(), tiny.tokenizer(), None, "embeddings")


@pytest.fixture
def pictures(tmp_path):
    """Two dark pictures and one bright one, which is called dark, and one bright one."""
    for name, values in {"w9": (0, 10, 255), "w11": (250,)}.items():
        (tmp_path / "set" / name).mkdir(parents=True)
        for number, value in enumerate(values):
            Image.fromarray(np.full((4, 4, 3), value, dtype=np.uint8)).save(tmp_path / "set" / name / f"{number}.png")
    return tmp_path / "set"


def test_a_class_is_the_normed_mean_of_its_normed_descriptions(speech):
    # "w9 w13" is (3, 1), "w9" is (-1, 1): normed, added and normed again.
    found = class_embeddings(speech, ZeroShot(("w9", "w11"), ("{}", "{} w13")), 3, QUIET)
    both = torch.tensor([[-1.0, 1.0], [3.0, 1.0]]) / torch.tensor([[math.sqrt(2)], [math.sqrt(10)]])
    assert torch.allclose(found[0], both.mean(0) / both.mean(0).norm())


def test_logits_by_hand(sight, speech):
    classifier = zero_shot_classifier(sight, speech, ZeroShot(("w9", "w11"), ("{}",)), 4, QUIET)
    logits = classifier.model(pixel_values=torch.full((1, 3, 4, 4), 2.0))["logits"]
    # (2, 1) against (-1, 1) and (1, 1).
    expected = torch.tensor([[-1 / math.sqrt(10), 3 / math.sqrt(10)]])
    assert torch.allclose(logits, SCALE * expected)


def test_an_encoder_of_pictures_becomes_a_classifier(sight, speech, pictures, processor):
    turned = LoadedModel("turned", Sight(turned=True).eval(), None, processor, "embeddings")
    classes = ZeroShot(("w9", "w11"), ("{}",))
    report = evaluate(
        [sight, turned], images=[pictures], zero_shot=classes, text_model=speech, reference=sight, batch_size=3
    )
    right, wrong = (model.images[0] for model in report.models)
    assert (right.top1, right.reference_top1, right.kl) == (3 / 4, 3 / 4, 0.0)
    assert (wrong.top1, wrong.top1_agreement) == (1 / 4, 0.0)


def test_without_classes_an_encoder_is_compared_by_its_embeddings(sight, pictures, processor):
    turned = LoadedModel("turned", Sight(turned=True).eval(), None, processor, "embeddings")
    report = evaluate([sight, turned], images=[pictures], reference=sight, batch_size=3)
    same, other = (model.embeddings[0] for model in report.models)
    assert (same.count, same.similarity) == (4, pytest.approx(1))
    means = torch.tensor([-1.0, 20 / 255 - 1, 1.0, 500 / 255 - 1], dtype=torch.float64)
    assert other.similarity == pytest.approx(float(((1 - means**2) / (1 + means**2)).mean()), abs=1e-6)
    with pytest.raises(RequestError, match="can only be compared with a reference"):
        evaluate([sight], images=[pictures])


def test_towers_that_do_not_belong_together_are_refused(sight, speech, tiny):
    classes = ZeroShot(("w9", "w11"), ("{}",))
    with pytest.raises(
        RequestError, match="sight: an encoder that reads tokens is required, but it gives embeddings of pict"
    ):
        zero_shot_classifier(sight, sight, classes, 4, QUIET)
    wide = LoadedModel("wide", Speech(features=3).eval(), tiny.tokenizer(), None, "embeddings")
    with pytest.raises(
        RequestError, match="wide: embeddings of 2 features, as sight gives, are required, but its own have 3"
    ):
        zero_shot_classifier(sight, wide, classes, 4, QUIET)


def test_names_without_pictures_are_refused(tiny_model, tiny_text):
    with pytest.raises(RequestError, match="names of classes need pictures to name"):
        evaluate([tiny_model], texts=[tiny_text], zero_shot=ZeroShot(("a",), ("{}",)))


def test_files_of_names_and_templates(tmp_path):
    names, templates = tmp_path / "names.txt", tmp_path / "templates.txt"
    names.write_text("cat\n\nbig dog \n")
    templates.write_text("a photo of a {}.\n{}\n")
    assert read_zero_shot(names, templates) == ZeroShot(("cat", "big dog"), ("a photo of a {}.", "{}"))
    assert read_zero_shot(names, None).templates == ("{}",)


@pytest.mark.parametrize(
    ("names", "templates", "message"),
    [
        ("", "{}", "at least one line is required"),
        ("cat\ncat", "{}", "each class is required once, but 'cat' stands there again"),
        ("cat", "a photo", r"one \{\} for the name is required in each line, but 'a photo' came"),
        ("cat", "{} {}", r"one \{\} for the name"),
    ],
)
def test_broken_files_of_names_and_templates(tmp_path, names, templates, message):
    (tmp_path / "names.txt").write_text(names)
    (tmp_path / "templates.txt").write_text(templates)
    with pytest.raises(RequestError, match=message):
        read_zero_shot(tmp_path / "names.txt", tmp_path / "templates.txt")


def test_missing_and_foreign_files_of_names(tmp_path):
    with pytest.raises(RequestError, match="there is none; check the path"):
        read_zero_shot(tmp_path / "none.txt", None)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(RequestError, match="UTF-8 text is required, but byte 3 is not"):
        read_zero_shot(tmp_path / "latin.txt", None)


def test_a_classifier_is_not_compared_with_an_encoder(sight, speech, pictures, tmp_path):
    classifier = zero_shot_classifier(sight, speech, ZeroShot(("w9", "w11"), ("{}",)), 4, QUIET)
    with pytest.raises(
        RequestError, match="embeddings, as the reference sight gives, are required, but it gives logits"
    ):
        evaluate([classifier], images=[pictures], reference=sight)
