"""Name -> part, with the paper it comes from.

A part registers itself where it is defined, which makes it appear in recipes, in `bitmend list`, in the docs and in the
shared laws. Nothing else has to be edited.
"""

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from bitmend.errors import UnknownNameError, nearest_name

PartT = TypeVar("PartT")


@dataclass(frozen=True)
class Entry(Generic[PartT]):
    """One registered part.

    Attributes:
        name: the key in recipes and on the command line.
        part: the class or object itself.
        paper: where the idea comes from, for example an arXiv number; empty for common knowledge.
        summary: the first line of the part's docstring.
    """

    name: str
    part: PartT
    paper: str
    summary: str


class Registry(Generic[PartT]):
    """The names of one kind of part, filled by importing the modules of one package."""

    def __init__(self, kind: str, package: str) -> None:
        self.kind = kind
        self.package = package
        self._entries: dict[str, Entry[PartT]] = {}

    def register(self, name: str, *, paper: str = "") -> Callable[[Any], Any]:
        """Return a decorator that files the decorated class under `name`.

        Raises:
            ValueError: the name is taken by another part.
        """

        def decorate(part: Any) -> Any:
            taken = self._entries.get(name)
            if taken is not None and taken.part is not part:
                raise ValueError(f"{self.kind} {name!r} is already registered by {taken.part!r}")
            summary = (part.__doc__ or "").strip().partition("\n")[0]
            self._entries[name] = Entry(name, part, paper, summary)
            return part

        return decorate

    def __getitem__(self, name: str) -> PartT:
        self._import_all()
        if name not in self._entries:
            hint = nearest_name(name, self._entries)
            raise UnknownNameError(f"no {self.kind} is called {name!r}{hint}")
        return self._entries[name].part

    def __iter__(self) -> Iterator[Entry[PartT]]:
        self._import_all()
        return iter(sorted(self._entries.values(), key=lambda entry: entry.name))

    def __contains__(self, name: object) -> bool:
        self._import_all()
        return name in self._entries

    def _import_all(self) -> None:
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self.package}.{module.name}")
