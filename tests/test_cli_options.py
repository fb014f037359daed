import pytest

from bitmend.cli_options import check_json_path, recipe_keys, write_json
from bitmend.errors import RequestError


def test_options_become_recipe_keys():
    keys = recipe_keys(["solver.damping=0.05"], 3, None, 16, None, 7)
    assert keys == {
        "solver.damping": 0.05, "weights.bits": 3, "calibration.sequences": 16, "calibration.seed": 7
    }  # fmt: skip


def test_a_key_that_is_set_twice():
    with pytest.raises(
        RequestError, match=r"weights\.bits is set twice, by --set to 4 and by its own option to 3; keep one"
    ):
        recipe_keys(["weights.bits=4"], 3, None, None, None, None)


def test_files_that_cannot_be_written(tmp_path):
    check_json_path(None)
    check_json_path(tmp_path / "new.json")
    with pytest.raises(RequestError, match=r"the result cannot be written to .*need a file in an existing folder"):
        check_json_path(tmp_path / "none" / "new.json")
    with pytest.raises(RequestError, match=r"the result could not be written to"):
        write_json(tmp_path, {})
