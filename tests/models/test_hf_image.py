"""Image classifiers opened block by block: their blocks, and that replaying them gives what the whole model gives."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from bitmend.errors import ModelError, RequestError
from bitmend.models.find import find_adapter
from bitmend.models.hf_image import HfImage
from bitmend.models.loading import read_config
from bitmend.models.tensor_source import TensorSource
from bitmend.numerics.products import FastLinear
from bitmend.protocols import ImageBatch, TokenBatch
from bitmend.testing.replay import replay

spec = importlib.util.spec_from_file_location("bitmend_image_families", Path(__file__).parent / "image_families.py")
assert spec is not None
families = importlib.util.module_from_spec(spec)
sys.modules["bitmend_image_families"] = families
assert spec.loader is not None
spec.loader.exec_module(families)
FAMILIES = families.IMAGE_FAMILIES


def make_model(folder, family, dtype=torch.float32, **changes):
    torch.manual_seed(0)
    model = transformers.AutoModelForImageClassification.from_config(family.config(**changes)).to(dtype)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):  # as trained ones are
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2)
            if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.2)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.normal_(0, 0.2)
    model.save_pretrained(folder)
    return model.eval()


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def opened(request, tmp_path_factory):
    family, folder = FAMILIES[request.param], tmp_path_factory.mktemp(request.param)
    return family, make_model(folder, family), find_adapter(folder)


def pictures(family, count=3):
    return ImageBatch(torch.randn(count, *family.shape, generator=torch.Generator().manual_seed(1)))


def test_the_blocks_are_those_of_the_family(opened):
    family, _, adapter = opened
    if family.blocks:
        assert adapter.block_names == family.blocks
    assert adapter.head_names == family.heads
    assert adapter.reads == "pictures"
    assert adapter.idle == ()


def test_the_first_layer_reads_the_pictures(opened):
    _, _, adapter = opened
    assert isinstance(adapter.model.get_submodule(adapter.first_layer), nn.Conv2d)
    assert adapter.model.get_submodule(adapter.first_layer).in_channels == 3


def test_replaying_the_blocks_gives_the_models_logits_bit_for_bit(opened):
    family, model, adapter = opened
    batch = pictures(family)
    with torch.no_grad(), FastLinear():
        assert torch.equal(replay(adapter, batch), model(pixel_values=batch.pixels).logits)


def test_the_blocks_hold_every_layer_but_the_heads(opened):
    family, model, adapter = opened
    found = []
    for index in range(len(adapter.block_names)):
        adapter.load_block(index)
        found += [site.name for site in adapter.describe_block(index, adapter.few_rows()).sites]
        adapter.release_block(index)
    layers = {name for name, part in model.named_modules() if isinstance(part, (nn.Linear, nn.Conv2d))}
    assert set(found) | set(family.heads) == layers
    assert len(found) == len(set(found)) == family.sites


def test_a_picture_counts_as_many_rows_as_a_layer_makes_of_it(tmp_path):
    family = FAMILIES["vit"]
    make_model(tmp_path, family)
    adapter = HfImage.open(tmp_path)
    adapter.load_block(0)
    (patches,) = adapter.describe_block(0, adapter.few_rows()).groups
    assert (patches.rows_per_place, patches.entries_per_place) == (4, 3 * 8 * 8)  # four patches of a picture of 8 x 8
    adapter.load_block(1)
    first = adapter.describe_block(1, adapter.few_rows()).groups[0]
    assert [site.path for site in first.sites] == ["attention.q_proj", "attention.k_proj", "attention.v_proj"]
    assert (first.rows_per_place, first.entries_per_place) == (5, 5 * 16)  # and the class token
    assert first.norm == "layernorm_before"


def test_tokens_are_refused(opened):
    _, _, adapter = opened
    with pytest.raises(RequestError, match="the model reads pictures, but tokens came"):
        adapter.block_inputs(TokenBatch(torch.zeros(1, 2, dtype=torch.int64)))


def test_pictures_of_another_size_are_refused_in_one_sentence(tmp_path):
    make_model(tmp_path, FAMILIES["vit"])
    adapter = HfImage.open(tmp_path)
    with pytest.raises(RequestError, match=r"could not be followed on pictures of \(3, 12, 12\)"):
        adapter.block_inputs(ImageBatch(torch.zeros(1, 3, 12, 12)))


def test_a_convolutional_network_takes_pictures_of_another_size(tmp_path):
    family = FAMILIES["resnet_basic"]
    model = make_model(tmp_path, family)
    adapter = HfImage.open(tmp_path)
    batch = ImageBatch(torch.randn(2, 3, 24, 24))
    inputs = adapter.block_inputs(batch)
    hidden = inputs.hidden
    for index in range(len(adapter.block_names)):
        adapter.load_block(index)
        hidden = adapter.run_block(index, hidden, inputs)
    with torch.no_grad(), FastLinear():
        expected = model(pixel_values=batch.pixels).logits
        assert torch.equal(adapter.logits(hidden, batch), expected)


class Nothing(TensorSource):
    """Fills no place."""

    def __init__(self):
        self.dtype, self.device, self.ties, self.names = torch.float32, torch.device("cpu"), {}, ()

    def tie(self):
        pass


class Skipping(nn.Module):
    """Two links of a chain, and a head that also reads what the first of them returns."""

    def __init__(self):
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
        self.two = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())
        self.head = nn.Linear(4, 3)

    def forward(self, pixel_values):
        first = self.one(pixel_values)
        return transformers.modeling_outputs.ImageClassifierOutput(
            logits=self.head((self.two(first) + first).mean((2, 3)))
        )


def test_a_model_that_reads_a_block_twice_is_refused(tmp_path, monkeypatch):
    make_model(tmp_path, FAMILIES["vit"])
    config = read_config(tmp_path)
    model = Skipping().eval()
    with torch.device("meta"):
        twin = Skipping().eval()

    with pytest.raises(ModelError, match="in another place than the next block"):
        HfImage(model, tmp_path, config, Nothing(), twin)


def test_a_layer_beside_the_chain_is_refused(tmp_path):
    class Beside(Skipping):
        def __init__(self):
            super().__init__()
            self.gate = nn.Conv2d(3, 4, 1)

        def forward(self, pixel_values):
            gated = self.gate(pixel_values * 2)
            hidden = self.two(self.one(pixel_values))
            return transformers.modeling_outputs.ImageClassifierOutput(logits=self.head((hidden * gated).mean((2, 3))))

    make_model(tmp_path, FAMILIES["vit"])
    with torch.device("meta"):
        twin = Beside().eval()

    with pytest.raises(ModelError, match=r"run beside its blocks \(gate\)"):
        HfImage(Beside().eval(), tmp_path, read_config(tmp_path), Nothing(), twin)


def test_a_language_model_is_no_image_classifier(tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="it is not an image classifier"):
        HfImage.open(tmp_path)
