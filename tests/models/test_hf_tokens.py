"""What all models that read tokens have in common; the families are in test_hf_causal_lm.py and test_hf_text_encoder.py."""

import pytest
import torch
import transformers

from bitmend.errors import ModelError
from bitmend.models.hf_text_encoder import HfTextEncoder
from bitmend.protocols import TokenBatch

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 61}


def test_blocks_that_run_twice_are_refused(tmp_path):
    transformers.AlbertModel(transformers.AlbertConfig(embedding_size=16, **SIZES)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"run in the order \[0, 0\], need each once and in turn"):
        HfTextEncoder.open(tmp_path)


def test_a_model_that_cannot_run_on_two_tokens_is_told(tmp_path, monkeypatch):
    transformers.BertModel(transformers.BertConfig(**SIZES)).save_pretrained(tmp_path)

    def failing(self, **call):
        raise ValueError("no such thing")

    monkeypatch.setattr(transformers.BertModel, "forward", failing)
    with pytest.raises(ModelError, match=r"could not run on two tokens \(ValueError: no such thing\)"):
        HfTextEncoder.open(tmp_path)


def test_only_the_beginning_of_some_rows_is_traced(tmp_path):
    transformers.BertModel(transformers.BertConfig(**SIZES)).save_pretrained(tmp_path)
    adapter = HfTextEncoder.open(tmp_path)
    lengths: list[tuple[int, ...]] = []
    block = adapter.load_block(0)
    block.register_forward_pre_hook(lambda module, arguments: lengths.append(tuple(arguments[0].shape[:2])))
    ids = torch.full((9, 50), 5)
    described = adapter.describe_block(0, TokenBatch(ids, torch.ones(9, 50, dtype=torch.bool)))
    assert set(lengths) == {(4, 32)}
    assert [site.path.rpartition(".")[2] for site in described.sites] == [
        "query",
        "key",
        "value",
        "dense",
        "dense",
        "dense",
    ]
