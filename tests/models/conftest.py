"""Model folders on disk for the tests of this folder."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bitmend.protocols import TokenBatch


def _load_families() -> Any:
    # Tests are no package, so a sibling file has to be loaded by its path; once, so that its classes are the same.
    name = "bitmend_test_families"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name("families.py"))
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


FAMILIES = _load_families().FAMILIES
EXPERT_FAMILIES = _load_families().EXPERT_FAMILIES


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "family_name" in metafunc.fixturenames:
        metafunc.parametrize("family_name", list(FAMILIES))
    if "expert_family" in metafunc.fixturenames:
        metafunc.parametrize("expert_family", list(EXPERT_FAMILIES))


@pytest.fixture(scope="session")
def families() -> dict[str, Any]:
    return FAMILIES


@pytest.fixture(scope="session")
def expert_families() -> dict[str, Any]:
    return EXPERT_FAMILIES


@pytest.fixture
def family(family_name: str) -> Any:
    return FAMILIES[family_name]


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that saves a tiny model and gives its folder; the same request gives the same folder."""
    known: dict[str, Path] = {}

    def save(name: str = "llama", dtype: torch.dtype = torch.float32, shard: str = "1GB", **changes: Any) -> Path:
        key = repr((name, dtype, shard, sorted(changes.items())))
        if key not in known:
            folder = tmp_path_factory.mktemp(name)
            (FAMILIES | EXPERT_FAMILIES)[name].build(**changes).to(dtype).save_pretrained(folder, max_shard_size=shard)
            known[key] = folder
        return known[key]

    return save


@pytest.fixture
def full_rows() -> TokenBatch:
    return TokenBatch(torch.randint(3, 61, (3, 11), generator=torch.Generator().manual_seed(1)))


@pytest.fixture
def ragged_rows(full_rows: TokenBatch) -> TokenBatch:
    mask = torch.arange(11)[None, :] < torch.tensor([[11], [7], [3]])
    return TokenBatch(full_rows.ids.masked_fill(~mask, 0), mask)
