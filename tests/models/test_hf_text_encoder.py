"""Encoders of text and of pictures: replayed block by block they give what the model itself gives, to the last bit."""

import pytest
import torch
import transformers
from transformers.models.bert.modeling_bert import BertModel

from bitmend.errors import ModelError
from bitmend.models.architecture import context_of, encoder_class, two_towers
from bitmend.models.find import find_adapter
from bitmend.models.hf_image import answer_of
from bitmend.protocols import ImageBatch, TokenBatch
from bitmend.testing.replay import replay

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {
    "BertModel": ("BertConfig", {}),
    "RobertaModel": ("RobertaConfig", {}),
    "MPNetModel": ("MPNetConfig", {}),
    "ElectraModel": ("ElectraConfig", {"embedding_size": 16}),
    "DebertaV2Model": ("DebertaV2Config", {"relative_attention": True}),
    "ModernBertModel": ("ModernBertConfig", {"pad_token_id": 0}),
    "CLIPTextModel": ("CLIPTextConfig", {"eos_token_id": 99, "bos_token_id": 98}),
    "CLIPTextModelWithProjection": ("CLIPTextConfig", {"eos_token_id": 99, "bos_token_id": 98, "projection_dim": 8}),
}
PICTURES = {
    "ViTModel": ("ViTConfig", {"image_size": 8, "patch_size": 4}),
    "Dinov2Model": ("Dinov2Config", {"image_size": 8, "patch_size": 4}),
    "CLIPVisionModel": ("CLIPVisionConfig", {"image_size": 8, "patch_size": 4}),
    "CLIPVisionModelWithProjection": ("CLIPVisionConfig", {"image_size": 8, "patch_size": 4, "projection_dim": 8}),
    "ResNetModel": ("ResNetConfig", {"hidden_sizes": [8, 8], "depths": [1, 1], "embedding_size": 8}),
}


def save(folder, name, config_name, **changes):
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config_name)(**SIZES | changes)).eval()
    for parameter in model.parameters():  # zeros and ones would hide a swapped bias or norm
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model


@pytest.fixture
def ragged():
    """Three texts, of which one is shorter than the others."""
    ids = torch.randint(3, 60, (3, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(3, 7, dtype=torch.bool)
    ids[0, 4:], mask[0, 4:] = 1, False
    return TokenBatch(ids, mask)


@pytest.fixture
def clip(tmp_path):
    """A model with two towers of different widths."""
    torch.manual_seed(0)
    tower = SIZES | {"hidden_size": 24}
    config = transformers.CLIPConfig(
        text_config=SIZES | {"vocab_size": 100, "eos_token_id": 99, "bos_token_id": 98},
        vision_config=tower | {"image_size": 8, "patch_size": 4},
        projection_dim=12,
    )
    model = transformers.CLIPModel(config).eval()
    model.save_pretrained(tmp_path / "clip")
    return tmp_path / "clip", model


@pytest.mark.parametrize("name", TEXT)
def test_a_text_encoder_replayed_is_itself(tmp_path, name, ragged):
    config, changes = TEXT[name]
    model = save(tmp_path, name, config, vocab_size=100, **changes)
    adapter = find_adapter(tmp_path)
    with torch.no_grad():
        output = model(input_ids=ragged.ids, attention_mask=ragged.mask.long())
    expected = output.text_embeds if name.endswith("Projection") else output.last_hidden_state
    assert torch.equal(replay(adapter, ragged), expected)
    assert len(adapter.block_names) == 2
    assert adapter.head_names == (("text_projection",) if name.endswith("Projection") else ())


@pytest.mark.parametrize("name", PICTURES)
def test_an_encoder_of_pictures_replayed_is_itself(tmp_path, name):
    config, changes = PICTURES[name]
    model = save(tmp_path, name, config, **changes)
    adapter = find_adapter(tmp_path)
    pixels = torch.randn(3, *adapter.image_shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(replay(adapter, ImageBatch(pixels)), answer_of(model(pixel_values=pixels)))


def test_what_an_encoder_of_pictures_answers_is_its_projection(tmp_path):
    config, changes = PICTURES["CLIPVisionModelWithProjection"]
    model = save(tmp_path, "CLIPVisionModelWithProjection", config, **changes)
    with torch.no_grad():
        output = model(pixel_values=torch.zeros(1, 3, 8, 8))
    assert torch.equal(answer_of(output), output.image_embeds)


def test_both_towers_are_those_of_the_whole_model(clip, ragged):
    folder, model = clip
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        of_text = model.get_text_features(input_ids=ragged.ids, attention_mask=ragged.mask.long())
        of_pixels = model.get_image_features(pixel_values=pixels)
    text, vision = find_adapter(folder, tower="text"), find_adapter(folder, tower="vision")
    assert torch.equal(replay(text, ragged), getattr(of_text, "pooler_output", of_text))
    assert torch.equal(replay(vision, ImageBatch(pixels)), getattr(of_pixels, "pooler_output", of_pixels))
    assert (text.task, vision.task) == ("CLIPTextModelWithProjection", "CLIPVisionModelWithProjection")
    assert (text.head_names, vision.head_names) == (("text_projection",), ("visual_projection",))
    assert vision.reopened(torch.float64).tower == "vision"


def test_a_model_with_two_towers_needs_to_be_told_which(clip, tmp_path):
    with pytest.raises(ModelError, match=r"holds CLIPModel, which has two towers; pass --tower vision or --tower text"):
        find_adapter(clip[0])
    with pytest.raises(ModelError, match=r"a tower is vision or text, but 'audio' came"):
        find_adapter(clip[0], tower="audio")
    save(tmp_path / "bert", "BertModel", "BertConfig", vocab_size=100)
    with pytest.raises(ModelError, match=r"to take its text tower, but it is BertModel; leave the tower out"):
        find_adapter(tmp_path / "bert", tower="text")


def test_an_answer_that_reads_an_earlier_block_is_refused(tmp_path, monkeypatch):
    save(tmp_path, "BertModel", "BertConfig", vocab_size=100)
    honest = BertModel.forward

    def mixing(self, *args, **kwargs):
        output = honest(self, *args, **kwargs, output_hidden_states=True)
        output.last_hidden_state = output.last_hidden_state + output.hidden_states[1]
        return output

    monkeypatch.setattr(BertModel, "forward", mixing)
    with pytest.raises(ModelError, match=r"reads what a block returns in another place than the next block"):
        find_adapter(tmp_path)


@pytest.mark.parametrize(
    ("config", "named", "tokens", "pictures"),
    [
        (transformers.BertConfig(), "BertModel", "BertModel", None),
        (transformers.BertConfig(), None, "BertModel", None),
        (transformers.BertConfig(), "BertForMaskedLM", None, None),
        (transformers.BertConfig(is_decoder=True), "BertModel", None, None),
        (transformers.LlamaConfig(), "LlamaModel", None, None),
        (transformers.ViTConfig(), "ViTModel", None, "ViTModel"),
        (transformers.ViTConfig(), "ViTForImageClassification", None, None),
        (transformers.T5Config(), "T5EncoderModel", None, None),
        (transformers.CLIPConfig(), "CLIPModel", None, None),
    ],
)
def test_which_class_builds_an_encoder(config, named, tokens, pictures):
    config.architectures = None if named is None else [named]
    assert encoder_class(config, "tokens") == tokens
    assert encoder_class(config, "pictures") == pictures
    assert two_towers(config) == (named == "CLIPModel")


def test_a_layer_between_two_blocks_is_refused(tmp_path):
    save(tmp_path, "DebertaV2Model", "DebertaV2Config", vocab_size=100, relative_attention=True, conv_kernel_size=3)
    with pytest.raises(ModelError, match=r"block 1 .* is given something else than the block before it returns"):
        find_adapter(tmp_path)


def test_a_layer_before_the_blocks_is_no_head(tmp_path):
    save(tmp_path, "ElectraModel", "ElectraConfig", vocab_size=100, embedding_size=8)
    assert find_adapter(tmp_path).head_names == ()


def test_positions_that_are_never_used_do_not_count(tmp_path):
    model = save(
        tmp_path / "a", "RobertaModel", "RobertaConfig", vocab_size=100, max_position_embeddings=34, pad_token_id=3
    )
    assert context_of(model) == 30
    model(input_ids=torch.full((1, 30), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, 31), 5))
    other = save(tmp_path / "b", "BertModel", "BertConfig", vocab_size=34, max_position_embeddings=34)
    assert context_of(other) == 34
