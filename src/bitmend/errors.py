"""The one tree of errors.

Each message is one sentence that says where, what was required, what came and what to do. The class decides the exit
code of the command line: 2 when the request was wrong, 1 when the run itself failed.
"""

import difflib
import json
from collections.abc import Iterable
from typing import Any, ClassVar

LONGEST_MESSAGE = 2000


class QuantizationError(Exception):
    """Anything bitmend raises on purpose; the run failed."""

    exit_code: ClassVar[int] = 1

    def __str__(self) -> str:
        """Return the message as one line that is safe to show: names in it may come from a stranger's file."""
        text = "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in super().__str__())
        half = LONGEST_MESSAGE // 2  # the end says what to do
        return text if len(text) <= LONGEST_MESSAGE else f"{text[:half]} ... {text[-half:]}"


class NumericsError(QuantizationError):
    """A NaN or an infinity in weights or activations."""


class FactorizationError(QuantizationError):
    """A second moment that stays indefinite after the whole damping ladder."""


class GuardError(QuantizationError):
    """The run broke its own guard, for example too many sites fell back."""


class ExportError(QuantizationError):
    """A written file, read back by its own reader, does not give the logits that it should."""


class OutputError(QuantizationError):
    """The output could not be written while the run was under way, for example on a full disk."""


class RequestError(QuantizationError):
    """The request was wrong: an unknown key, a missing file, bits that do not fit."""

    exit_code: ClassVar[int] = 2


class ResumeError(RequestError):
    """A run that cannot be gone on with: it was made with another request, or its journal is damaged."""


class UnknownNameError(RequestError):
    """A name that nothing is registered under."""


class RecipeError(RequestError):
    """A recipe that cannot be read, or that asks for what is impossible."""


class ModelError(RequestError):
    """A model folder that is missing, incomplete or of an architecture that no adapter reads."""


class CalibrationError(RequestError):
    """Calibration data that are missing, empty or too short."""


class CheckpointError(RequestError):
    """A checkpoint that is cut short, altered or inconsistent with its own description."""


def nearest_name(name: str, known: Iterable[str]) -> str:
    """Return `"; did you mean X?"` for the nearest known name, or the list of known names.

    The text is made to end an error sentence.
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known: {', '.join(names)}" if names else "; none is registered"


def is_whole_text(values: Any) -> bool:
    r"""Return whether JSON values can be written as UTF-8, which text with half of a character cannot.

    Example:
        >>> is_whole_text({"key": ["\u00e9"]}), is_whole_text({"key": ["\ud800"]})
        (True, False)
    """
    try:
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True
