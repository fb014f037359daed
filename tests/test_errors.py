import pytest

from bitmend import errors


def test_exit_codes_tell_a_wrong_request_from_a_failed_run():
    assert errors.QuantizationError.exit_code == 1
    assert errors.NumericsError.exit_code == 1
    assert errors.RecipeError.exit_code == 2
    assert errors.CheckpointError.exit_code == 2


@pytest.mark.parametrize(
    ("name", "known", "text"),
    [
        ("gtpq", ["gptq", "rtn"], "; did you mean 'gptq'?"),
        ("zzz", ["gptq", "rtn"], "; known: gptq, rtn"),
        ("zzz", [], "; none is registered"),
    ],
)
def test_the_nearest_name_is_offered(name, known, text):
    assert errors.nearest_name(name, known) == text


def test_a_message_is_one_line_that_is_safe_to_show_and_bounded():
    error = errors.CheckpointError("tensor 'a\n\x1b[2J\0\ud800é' is missing")
    assert str(error) == r"tensor 'a\n\x1b[2J\x00\ud800é' is missing"
    assert str(error).isprintable()
    long = str(errors.CheckpointError("y" * 10**6 + "; copy it again"))
    assert len(long) < 2100
    assert "yy ... yy" in long
    assert long.endswith("; copy it again")
