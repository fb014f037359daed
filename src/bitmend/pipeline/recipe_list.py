"""Several recipes in one line of text, each under a label of its own.

A list is separated by commas. An entry is `RECIPE`, `LABEL=RECIPE` or `LABEL=RECIPE:KEY=VALUE;KEY=VALUE`:

    rtn, llm-w3-marr, gptaq-1=gptaq:solver.residual_strength=1.0, mine=trial.toml:weights.bits=3;weights.group_size=64

RECIPE is what `--recipe` takes. The keys are those of `--set` and hold for this entry alone. Commas and semicolons inside
brackets or quotes belong to a value. Without a label, an entry is called after its recipe.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitmend.errors import RecipeError, RequestError
from bitmend.pipeline.recipe import Recipe, load_recipe, parse_assignments

SYNTAX = "RECIPE, LABEL=RECIPE or LABEL=RECIPE:KEY=VALUE;KEY=VALUE"
LABEL = re.compile(r"[A-Za-z0-9][\w.+-]*", re.ASCII)  # labels become folder names
SCRATCH = (".partial", ".replaced")  # what the writer appends to the folder that it works on
RECIPE_AND_KEYS = re.compile(r"((?:[A-Za-z]:[\\/])?[^:]*)(?::(.*))?", re.DOTALL)  # the colon of C:\ begins no keys
CLOSING = {"[": "]", "{": "}"}


@dataclass(frozen=True)
class LabelledRecipe:
    """One recipe of a comparison.

    Attributes:
        label: its name in tables and its folder.
        recipe: what it does.
    """

    label: str
    recipe: Recipe


def parse_recipe_list(lists: Sequence[str], overrides: Mapping[str, Any] | None = None) -> tuple[LabelledRecipe, ...]:
    """Return the recipes of one or several lists.

    Args:
        lists: see the module.
        overrides: recipe keys to replace in every entry; an entry's own keys win over them.

    Raises:
        RequestError: no entry, an entry of another form, a label given twice, no such recipe.
        RecipeError: an unknown key or a value that does not fit, with the label.
    """
    entries = [entry.strip() for text in lists for entry in split_outside_values(text, ",") if entry.strip()]
    if not entries:
        raise RequestError(f"a comparison needs at least one recipe, but none came; give {SYNTAX}, separated by commas")
    recipes = [_labelled(entry, overrides or {}) for entry in entries]
    taken: set[str] = set()
    for labelled in recipes:
        if labelled.label.casefold() in taken:  # two names that differ in case only are one folder on some disks
            raise RequestError(
                f"two recipes are labelled {labelled.label!r}; give one of them a label of its own, LABEL=RECIPE"
            )
        taken.add(labelled.label.casefold())
    return tuple(recipes)


def check_same_rows(recipes: Sequence[LabelledRecipe]) -> None:
    """Refuse recipes that would draw different calibration rows.

    Raises:
        RecipeError: two of them differ in a key of `[calibration]` that decides the rows or their split.
    """
    first, *others = recipes
    wanted = first.recipe.calibration.model_dump(exclude={"refit"})
    for other in others:
        for key, value in other.recipe.calibration.model_dump(exclude={"refit"}).items():
            if value != wanted[key]:
                raise RecipeError(
                    f"all recipes of a comparison must share their calibration rows, but calibration.{key} is "
                    f"{wanted[key]} in {first.label!r} and {value} in {other.label!r}; "
                    f"set it for all of them, for example with --set calibration.{key}=..."
                )


def split_outside_values(text: str, separator: str) -> list[str]:
    """Split at a character wherever it is not inside brackets or quotes."""
    parts, start = [], 0
    waiting: list[str] = []  # the characters that close what is open, innermost last
    for position, character in enumerate(text):
        if waiting and character == waiting[-1]:
            waiting.pop()
        elif waiting and waiting[-1] in "\"'":
            continue
        elif character in CLOSING or character in "\"'":
            waiting.append(CLOSING.get(character, character))
        elif character == separator and not waiting:
            parts.append(text[start:position])
            start = position + 1
    return [*parts, text[start:]]


def _labelled(entry: str, overrides: Mapping[str, Any]) -> LabelledRecipe:
    found = RECIPE_AND_KEYS.fullmatch(entry)
    head, keys_text = found.groups() if found else (entry, None)
    label, sign, name = (part.strip() for part in head.partition("="))
    if not sign:
        name = label
        label = Path(name).stem if name.endswith(".toml") else name
    if not name:
        raise RequestError(f"the entry {entry!r} names no recipe; it must look like {SYNTAX}")
    keys = {**overrides, **_own_keys(entry, keys_text)}
    try:
        recipe = load_recipe(name, keys)
    except RequestError as error:
        raise type(error)(f"recipe {label!r} of the comparison: {error}") from error
    if not LABEL.fullmatch(label) or label.endswith(SCRATCH):
        raise RequestError(
            f"{label!r} cannot be the label of {name!r}: a label holds letters, digits and . _ + -, begins with a letter "
            f"or a digit and does not end in {' or '.join(SCRATCH)}; write LABEL={name}"
        )
    return LabelledRecipe(label, recipe)


def _own_keys(entry: str, text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    assignments = [part.strip() for part in split_outside_values(text, ";")]
    for assignment in assignments:
        key, sign, _ = assignment.partition("=")
        if not sign or not key.strip():
            raise RequestError(f"the entry {entry!r} must look like {SYNTAX}, but {assignment!r} is no KEY=VALUE")
    return parse_assignments(assignments)
