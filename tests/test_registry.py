import pytest

from bitmend.errors import UnknownNameError
from bitmend.protocols import SOLVERS
from bitmend.registry import Registry


def test_parts_are_found_without_being_imported():
    names = [entry.name for entry in SOLVERS]
    assert names == sorted(names)
    assert {"gptq", "rtn"} <= set(names)
    assert "gptq" in SOLVERS
    assert "gtpq" not in SOLVERS


def test_a_mistyped_name_offers_the_nearest():
    with pytest.raises(UnknownNameError, match=r"no solver is called 'gtpq'; did you mean 'gptq'\?"):
        SOLVERS["gtpq"]


def test_the_summary_is_the_first_line_of_the_docstring():
    entry = next(entry for entry in SOLVERS if entry.name == "rtn")
    assert entry.summary == "Round every weight to its nearest level; needs no calibration data."


def test_a_name_cannot_be_taken_twice():
    registry = Registry("toy", "bitmend.solvers")
    registry.register("one")(object())
    with pytest.raises(ValueError, match="toy 'one' is already registered"):
        registry.register("one")(object())
