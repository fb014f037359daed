import os

import pytest

from bitmend.models import fingerprint as module
from bitmend.models.fingerprint import model_fingerprint


@pytest.mark.parametrize("whole", [True, False])
def test_a_fingerprint_changes_with_weights_and_config(tmp_path, monkeypatch, whole):
    if not whole:
        monkeypatch.setattr(module, "HASHED_WHOLE_BYTES", 0)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"abc")
    seen = [model_fingerprint(tmp_path), model_fingerprint(tmp_path)]
    (tmp_path / "model.safetensors").write_bytes(b"abd")
    seen.append(model_fingerprint(tmp_path))
    (tmp_path / "config.json").write_text("{ }")
    seen.append(model_fingerprint(tmp_path))
    assert seen[0] == seen[1]
    assert len(set(seen)) == 3


@pytest.mark.parametrize("pattern", ["x.safetensors", "x.bin"])
def test_only_regular_files_are_read(tmp_path, pattern):
    """A pipe would be waited for, and /dev/zero has no end."""
    (tmp_path / "config.json").write_text("{}")
    before = model_fingerprint(tmp_path)
    os.mkfifo(tmp_path / pattern)
    assert model_fingerprint(tmp_path) == before
    (tmp_path / pattern).unlink()
    (tmp_path / pattern).symlink_to("/dev/zero")
    assert model_fingerprint(tmp_path) == before
