"""Runs of the whole pipeline on tiny models."""

from pathlib import Path
from typing import Any

import pytest

from bitmend.pipeline.resume import Journal
from bitmend.pipeline.run import quantize

KEYS = {
    "weights.group_size": 8,
    "weights.observer": "minmax",
    "calibration.sequences": 8,
    "calibration.sequence_length": 12,
}


@pytest.fixture
def run_tiny(tmp_path: Path, tiny_model: Path, tiny_text: Path) -> Any:
    """Return a function that quantises a folder (the tiny llama unless given) into `output` and gives the report."""

    def run(output="out", model=None, recipe="gptq", keys=None, calibration=None, **options):
        texts = [tiny_text] if calibration is None else calibration
        overrides = {**KEYS, **(keys or {})}
        return quantize(model or tiny_model, recipe, texts, output=tmp_path / output, overrides=overrides, **options)

    return run


@pytest.fixture
def interrupted(run_tiny: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that starts a run and presses Ctrl-C after its k-th site."""

    def start(k, output, **request):
        seen = []

        def keep_and_stop(journal, solved, real=Journal.keep_site):
            real(journal, solved)
            seen.append(solved.site.name)
            if len(seen) == k:
                raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(Journal, "keep_site", keep_and_stop)
            with pytest.raises(KeyboardInterrupt):
                run_tiny(output=output, **request)

    return start


@pytest.fixture
def ends_alike(run_tiny: Any, interrupted: Any, tmp_path: Path) -> Any:
    """Return a function that stops a run after its k-th site, goes on, and compares the files with those of a whole run."""

    def compare(k, *, whole="whole", output="out", **request):
        if not (tmp_path / whole).exists():
            run_tiny(whole, **request)
        interrupted(k, output, **request)
        run_tiny(output, resume=True, **request)
        for name in ("model.safetensors", "config.json"):
            assert (tmp_path / output / name).read_bytes() == (tmp_path / whole / name).read_bytes(), name

    return compare
