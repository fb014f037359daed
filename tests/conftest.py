"""Settings that all tests share, and tiny language models with a tokenizer for the tests that run the whole pipeline."""

import importlib.util
import os
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from bitmend.numerics.products import FastLinear
from bitmend.protocols import SOLVERS, TRANSFORMS
from bitmend.registry import Entry

# The same examples every time, so that a red run can be repeated; `HYPOTHESIS_PROFILE=explore` looks for new ones.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("explore", deadline=None, max_examples=500)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

torch.set_num_threads(1)

VOCABULARY = 61
SLOW = Path(__file__).parent / "slow.txt"
LONG = ("test_readme.py", "test_examples.py", "test_demo.py")  # minutes each


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest tests, so that none of them is what all processes wait for in the end; mark the slow ones."""
    slow = {line for line in SLOW.read_text().splitlines() if line and not line.startswith("#")}
    for item in items:
        path = item.path.relative_to(SLOW.parent).as_posix()
        if f"{path}::{item.name}" in slow or f"{path}::{item.name.partition('[')[0]}" in slow:
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: item.path.name not in LONG)


def load_families() -> Any:
    # Tests are no package, so the file has to be loaded by its path; once, so that its classes are the same.
    name = "bitmend_test_families"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / "models" / "families.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


class Tiny:
    """Makers of models that take milliseconds. Word "w7" is token 7; 0, 1, 2 are unknown, begin and end of text."""

    vocabulary = VOCABULARY
    families = load_families().FAMILIES
    expert_families = load_families().EXPERT_FAMILIES

    @staticmethod
    def tokenizer() -> PreTrainedTokenizerFast:
        special = {"<unk>": 0, "<s>": 1, "</s>": 2}
        words = special | {f"w{number}": number for number in range(3, VOCABULARY)}
        tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
        tokenizer.pre_tokenizer = WhitespaceSplit()
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<unk>", bos_token="<s>", eos_token="</s>"
        )

    @classmethod
    def build(cls, family: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
        kind = (cls.families | cls.expert_families)[family]
        layers = 3 if "layer_types" in kind.changes else 2
        return kind.build(**{"num_hidden_layers": layers, **changes}).to(dtype)

    @classmethod
    def save(cls, folder: Path, model: Any) -> Path:
        model.save_pretrained(folder)
        cls.tokenizer().save_pretrained(folder)
        return folder

    @staticmethod
    def write_text(path: Path, words: int, seed: int = 0) -> Path:
        draw = random.Random(seed)
        path.write_text(" ".join(f"w{draw.randrange(3, VOCABULARY)}" for _ in range(words)))
        return path


@pytest.fixture(scope="session")
def tiny() -> type[Tiny]:
    return Tiny


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama of two blocks, with its tokenizer; read only."""
    return Tiny.save(tmp_path_factory.mktemp("models") / "tiny", Tiny.build())


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2,000 words."""
    return Tiny.write_text(tmp_path_factory.mktemp("texts") / "words.txt", 2000)


@contextmanager
def _products_as_run(model: torch.nn.Module, names: Sequence[str]) -> Iterator[None]:
    blocks = [model.get_submodule(name) for name in names]
    forwards = [block.forward for block in blocks]

    def fast(forward: Any) -> Any:
        def run(*args: Any, **options: Any) -> Any:
            with FastLinear():
                return forward(*args, **options)

        return run

    try:
        for block, forward in zip(blocks, forwards, strict=True):
            block.forward = fast(forward)
        yield
    finally:
        for block in blocks:
            del block.forward


@pytest.fixture(scope="session")
def products_as_run() -> Any:
    """A context, given a whole model and the names of its blocks, in which its blocks multiply as blocks run one by one do.

    On some kinds of CPU these products add up in another order than torch's own; what lies outside the blocks is torch's.
    """
    return _products_as_run


@pytest.fixture
def add_part(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return functions that register a solver or a transform until the test ends."""

    class Add:
        @staticmethod
        def solver(name: str, part: Any) -> None:
            monkeypatch.setitem(SOLVERS._entries, name, Entry(name, part, "", "only in this test"))

        @staticmethod
        def transform(name: str, part: Any) -> None:
            monkeypatch.setitem(TRANSFORMS._entries, name, Entry(name, part, "", "only in this test"))

    return Add
