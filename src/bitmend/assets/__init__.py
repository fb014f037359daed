"""The trained models and texts that come with bitmend, for its demo, its tests and first trials.

README.md beside this file says where each comes from and under which licence.
"""

import os
from pathlib import Path

from bitmend.errors import UnknownNameError, nearest_name

FOLDER = Path(__file__).parent
VARIABLE = "BITMEND_ASSETS"


def path(name: str) -> Path:
    """Return where a model folder or a text file lies, for example of `books-7m` or `books-eval`.

    Embedded assets come first. Whatever is not embedded is looked for in the folder that the environment variable
    `BITMEND_ASSETS` names, as `NAME` or as `text/NAME.txt`.

    Raises:
        UnknownNameError: neither place has it.
    """
    embedded = _embedded()
    if name in embedded:
        return embedded[name]
    if outside := os.environ.get(VARIABLE):
        for candidate in (Path(outside) / name, Path(outside) / "text" / f"{name}.txt"):
            if candidate.exists():
                return candidate
    searched = f"nor in {outside} ({VARIABLE})" if outside else f"and {VARIABLE} is not set (docs/data.md)"
    raise UnknownNameError(f"no asset called {name!r} comes with bitmend, {searched}{nearest_name(name, embedded)}")


def names() -> tuple[str, ...]:
    """Return the names of the embedded models and texts, sorted."""
    return tuple(sorted(_embedded()))


def _embedded() -> dict[str, Path]:
    models = {folder.name: folder for folder in (FOLDER / "models").iterdir() if folder.is_dir()}
    texts = {file.stem: file for file in (FOLDER / "text").glob("*.txt")}
    return models | texts
