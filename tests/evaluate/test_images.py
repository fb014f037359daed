import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import nn

from bitmend.calibrate.images import labelled
from bitmend.errors import NumericsError, RequestError
from bitmend.evaluate.evaluate import evaluate
from bitmend.evaluate.images import interval, labels_of, run_on_pictures, score_pictures
from bitmend.evaluate.load import LoadedModel
from bitmend.models.image_processor import load_processor
from bitmend.protocols import ImageBatch, SilentProgress

LABELS = {0: "dark", 1: "bright", 2: "other"}


class Brightness(nn.Module):
    """Names a picture by how bright it is: its logits are (-m, m, -9) for the mean m."""

    def __init__(self, factor=1.0):
        super().__init__()
        self.factor = factor
        self.config = transformers.ViTConfig(hidden_size=8, num_attention_heads=2, id2label=LABELS)
        self.device, self.dtype = torch.device("cpu"), torch.float32

    def forward(self, pixel_values):
        mean = self.factor * pixel_values.mean((1, 2, 3))
        logits = torch.stack([-mean, mean, torch.full_like(mean, -9.0)], dim=1)
        return transformers.modeling_outputs.ImageClassifierOutput(logits=logits)


@pytest.fixture
def pictures(tmp_path):
    """Three dark ones, of which one lies among the bright, and three bright ones."""
    values = {"dark": (0, 10, 250), "bright": (255, 240, 200)}
    for name, members in values.items():
        (tmp_path / "set" / name).mkdir(parents=True)
        for number, value in enumerate(members):
            Image.fromarray(np.full((4, 4, 3), value, dtype=np.uint8)).save(tmp_path / "set" / name / f"{number}.png")
    return tmp_path / "set"


@pytest.fixture
def processor(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(
        '{"image_processor_type": "ViTImageProcessor", "size": {"height": 4, "width": 4}}'
    )
    return load_processor(tmp_path)


@pytest.fixture
def model(processor):
    return LoadedModel("brightness", Brightness().eval(), None, processor)


def score(model, path, processor, reference=None, count=None):
    found = labelled(path, processor, labels_of(model))
    options = {"batch_size": 4, "count": count, "reference": reference, "progress": SilentProgress()}
    return score_pictures(model, found, **options)


def test_top1_by_hand(model, pictures, processor):
    found = score(model, pictures, processor)
    assert (found.count, found.top1) == (6, 5 / 6)  # one that is as bright as 250 lies among the dark
    assert found.top5 is None  # three classes
    assert (found.kl, found.reference_top1) == (None, None)
    assert found.top1_low < 5 / 6 < found.top1_high


def test_divergence_from_a_reference_by_hand(model, pictures, processor):
    doubled = LoadedModel("doubled", Brightness(2.0).eval(), None, processor)
    reference = torch.cat(
        [run_on_pictures(model, batch) for batch, _ in labelled(pictures, processor, LABELS).batches(4)]
    )
    found = score(doubled, pictures, processor, reference)
    mean = reference[:, 1].double()
    p = torch.stack([-mean, mean, torch.full_like(mean, -9)], 1).softmax(1)
    q = torch.stack([-2 * mean, 2 * mean, torch.full_like(mean, -9)], 1).softmax(1)
    assert found.kl == pytest.approx(float((p * (p / q).log()).sum(1).mean()), rel=1e-5)
    assert found.top1_agreement == 1.0
    assert found.reference_top1 == found.top1


def test_pictures_without_classes_need_a_reference(model, pictures, processor):
    with pytest.raises(RequestError, match="can only be compared with a reference"):
        score(model, pictures / "dark", processor)
    reference = torch.zeros(3, 3)
    found = score(model, pictures / "dark", processor, reference)
    assert (found.top1, found.count) == (None, 3)
    assert found.kl > 0


def test_a_reference_of_other_classes(model, pictures, processor):
    with pytest.raises(RequestError, match="the reference's 4 classes are required, but the model has 3"):
        score(model, pictures, processor, torch.zeros(6, 4))


def test_what_is_not_finite_is_told(pictures, processor):
    broken = LoadedModel("broken", Brightness(float("inf")).eval(), None, processor)
    with pytest.raises(NumericsError, match="broken: finite logits are required"):
        score(broken, pictures, processor)


def test_pictures_that_a_model_cannot_read(model):
    def refuse(pixel_values):
        raise ValueError("no such size")

    unready = LoadedModel("small", Brightness(), None, model.processor)
    unready.model.forward = refuse
    with pytest.raises(RequestError, match=r"its processor gives pictures of \(3, 4, 4\), .* \(no such size\)"):
        run_on_pictures(unready, ImageBatch(torch.zeros(1, 3, 4, 4)))


@pytest.mark.parametrize(
    ("share", "count", "wanted"), [(0.5, 100, (0.4, 0.6)), (1.0, 10, (1.0, 1.0)), (0.0, 3, (0.0, 0.0))]
)
def test_intervals(share, count, wanted):
    assert interval(share, count) == wanted


def test_a_subset_holds_what_was_asked(model, pictures, processor):
    assert score(model, pictures, processor, count=4).count == 4
    report = evaluate([model], images=[pictures], reference=model, pictures=4)
    assert report.models[0].images[0].count == 4
    assert report.models[0].images[0].kl == 0.0


def test_texts_and_pictures_do_not_go_together(model, pictures, tiny_text):
    with pytest.raises(RequestError, match="no model is scored on two of"):
        evaluate([model], images=[pictures], texts=[tiny_text])
    with pytest.raises(RequestError, match="the model reads pictures, but tokens came; pass --images"):
        evaluate([model], texts=[tiny_text])
