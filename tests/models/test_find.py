import json

import pytest
import transformers

from bitmend.errors import ModelError
from bitmend.models.find import find_adapter
from bitmend.models.hf_causal_lm import HfCausalLm
from bitmend.protocols import ADAPTERS, ModelAdapter

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24, "vocab_size": 61}


def test_finds_the_adapter(saved):
    adapter = find_adapter(str(saved("llama")))
    assert isinstance(adapter, HfCausalLm)
    assert isinstance(adapter, ModelAdapter)
    assert ADAPTERS["hf_causal_lm"] is HfCausalLm


def save(folder, kind, config):
    getattr(transformers, kind)(config).save_pretrained(folder)
    return folder


def test_encoder_decoder(tmp_path):
    config = transformers.T5Config(vocab_size=60, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4)
    save(tmp_path, "T5ForConditionalGeneration", config)
    with pytest.raises(
        ModelError,
        match=r"no adapter reads T5ForConditionalGeneration in .*hf_causal_lm: it is an encoder-decoder model.*"
        r"found encoder\.block \(2 x T5Block\), decoder\.block \(2 x T5Block\)",
    ):
        find_adapter(tmp_path)


def test_masked_language_model(tmp_path):
    save(tmp_path, "BertForMaskedLM", transformers.BertConfig(**TINY))
    with pytest.raises(
        ModelError,
        match=r"BertForMaskedLM .*it reads text in both directions; hf_image: it is not an image classifier; "
        r"hf_text_encoder: it is no text encoder\); "
        r"found bert\.encoder\.layer \(2 x BertLayer\)",
    ):
        find_adapter(tmp_path)
    with pytest.raises(ModelError, match=r"holds BertForMaskedLM, and it reads text in both directions; found bert"):
        HfCausalLm.open(tmp_path)


def test_classifier(tmp_path, families):
    save(tmp_path, "LlamaForSequenceClassification", families["llama"].config())
    with pytest.raises(ModelError, match=r"LlamaForSequenceClassification .*found model\.layers \(3 x LlamaDecoderLa"):
        find_adapter(tmp_path)


def test_model_that_looks_at_later_tokens(tmp_path):
    save(tmp_path, "BertLMHeadModel", transformers.BertConfig(**TINY))
    with pytest.raises(
        ModelError, match=r"looks at later tokens, need a decoder that attends to the past only; found bert\.encoder"
    ):
        find_adapter(tmp_path)


def test_unknown_class_of_a_known_model_type(tmp_path, families):
    content = families["llama"].config().to_dict() | {"architectures": ["LlamaForSomethingNew"]}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match=r"LlamaForSomethingNew .*its modules are unknown to transformers"):
        find_adapter(tmp_path)


def test_quantised_already(tmp_path, families):
    content = families["llama"].config().to_dict() | {"quantization_config": {"quant_method": "awq", "bits": 4}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    for call in (find_adapter, HfCausalLm.open):
        with pytest.raises(
            ModelError, match=r"is quantised already \(quant_method 'awq'\), need full-precision .*dequantise it first"
        ):
            call(tmp_path)


def test_bare_base_model_with_a_tied_head(tmp_path, families):
    save(tmp_path, "GPT2Model", families["gpt2"].config())
    assert find_adapter(tmp_path).block_names == tuple(f"transformer.h.{index}" for index in range(3))


def test_text_part_of_a_model_with_images(tmp_path, families):
    text = families["gemma3"].config().to_dict()
    vision = {**TINY, "num_hidden_layers": 5, "image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    save(tmp_path, "Gemma3ForConditionalGeneration", config)
    adapter = find_adapter(tmp_path)
    assert adapter.block_names == tuple(f"model.language_model.layers.{index}" for index in range(3))
    tower = [tensor for name, tensor in adapter.outside_tensors() if "vision_tower" in name]
    assert tower
    assert not any(tensor.is_meta for tensor in tower)
