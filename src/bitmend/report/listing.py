"""Tables of the parts that recipes can name."""

from typing import Any

from bitmend.pipeline.recipe import RECIPES_FOLDER, load_recipe
from bitmend.protocols import ADAPTERS, COMPENSATORS, FORMATS, REPARAMETERISATIONS, SOLVERS, TRANSFORMS
from bitmend.registry import Registry

TABLES: dict[str, Registry[Any]] = {
    "solvers": SOLVERS,
    "transforms": TRANSFORMS,
    "reparameterisations": REPARAMETERISATIONS,
    "compensators": COMPENSATORS,
    "models": ADAPTERS,
    "formats": FORMATS,
}


def listing(kind: str) -> list[list[str]]:
    """Return (name, what it does, source) of every part of one kind."""
    if kind == "recipes":
        return _recipes()
    return [[entry.name, entry.summary, entry.paper] for entry in TABLES[kind]]


def _recipes() -> list[list[str]]:
    rows = []
    for path in sorted(RECIPES_FOLDER.glob("*.toml")):
        text = path.read_text(encoding="utf-8")
        first = text.partition("\n")[0].lstrip("# ")
        rows.append([path.stem, first, load_recipe(path).solver["name"]])
    solvers = [
        [entry.name, "the solver alone, at the default grid: " + entry.summary, entry.paper] for entry in SOLVERS
    ]
    return rows + solvers
