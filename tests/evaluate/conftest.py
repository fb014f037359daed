"""Tiny language models in folders: a reference, a damaged copy, and texts of the words that their tokenizer knows."""

import random
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

VOCABULARY = 30
CONTEXT = 16


def make_tokenizer(begins: bool = False, shift: int = 0) -> PreTrainedTokenizerFast:
    """Word "w7" is token 7 (+ shift, around); token 0 is the beginning of text."""
    words = {f"w{number}": 1 + (number - 1 + shift) % (VOCABULARY - 1) for number in range(1, VOCABULARY)} | {"<s>": 0}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<s>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    if begins:
        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<s>")


def make_config(**changes) -> LlamaConfig:
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.2,
        "bos_token_id": 0,
        "eos_token_id": None,
    }
    return LlamaConfig(**{**settings, **changes})


def make_model(config=None, seed: int = 0):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config or make_config()).eval()


def save(folder: Path, model, tokenizer=None) -> Path:
    model.save_pretrained(folder)
    (tokenizer or make_tokenizer()).save_pretrained(folder)
    return folder


@dataclass
class Spoken:
    """A `Progress` that keeps what it was told."""

    lines: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)

    def track(self, items, label, total):
        self.labels.append(label)
        items = list(items)
        assert len(items) == total
        yield from items

    def say(self, line):
        self.lines.append(line)


@pytest.fixture
def spoken():
    return Spoken()


@pytest.fixture
def lab():
    """The makers above, for tests that need a model of their own."""

    class Lab:
        tokenizer = staticmethod(make_tokenizer)
        config = staticmethod(make_config)
        model = staticmethod(make_model)
        save = staticmethod(save)
        vocabulary = VOCABULARY
        context = CONTEXT

    return Lab


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BITMEND_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    return save(tmp_path_factory.mktemp("models") / "reference", make_model())


@pytest.fixture(scope="session")
def damaged(tmp_path_factory):
    model = make_model()
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return save(tmp_path_factory.mktemp("models") / "damaged", model)


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """50 words: six windows of 8 and a rest."""
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text(" ".join(f"w{draw.randrange(1, VOCABULARY)}" for _ in range(50)))
    return path
