"""The embedded models and texts are whole, and are found by name."""

import hashlib
import re

import pytest

from bitmend import assets
from bitmend.errors import UnknownNameError


def test_embedded_names():
    assert assets.names() == ("books-7m", "books-calibration", "books-eval", "books-validation", "stories-260k")


def test_models_are_folders_and_texts_are_files():
    assert (assets.path("books-7m") / "config.json").is_file()
    assert assets.path("books-eval").name == "books-eval.txt"


def test_files_are_those_of_the_table():
    table = (assets.FOLDER / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([^`]+)` \| `([0-9a-f]{64})` \|$", table, re.MULTILINE)
    assert len(rows) == 5
    for name, expected in rows:
        assert hashlib.sha256((assets.FOLDER / name).read_bytes()).hexdigest() == expected, name


def test_other_assets_are_found_in_the_folder_of_the_variable(tmp_path, monkeypatch):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "wikitext2-test.txt").write_text("= A =\n", encoding="utf-8")
    (tmp_path / "vit-cifar10").mkdir()
    monkeypatch.setenv(assets.VARIABLE, str(tmp_path))
    assert assets.path("wikitext2-test") == tmp_path / "text" / "wikitext2-test.txt"
    assert assets.path("vit-cifar10") == tmp_path / "vit-cifar10"
    with pytest.raises(UnknownNameError, match=r"no asset called 'vit' .* nor in .*BITMEND_ASSETS"):
        assets.path("vit")


def test_a_wrong_name_offers_the_nearest(monkeypatch):
    monkeypatch.delenv(assets.VARIABLE, raising=False)
    sentence = r"no asset called 'books-8m' .* is not set .* did you mean 'books-7m'\?"
    with pytest.raises(UnknownNameError, match=sentence):
        assets.path("books-8m")
