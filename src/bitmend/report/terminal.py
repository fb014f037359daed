"""Progress and tables: bars with the time left on a terminal, plain lines elsewhere."""

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

ItemT = TypeVar("ItemT")
SECONDS_BETWEEN_LINES = 10.0


class TerminalProgress:
    """A bar on a terminal; elsewhere (a log file, CI) one line at the start, now and then, and at the end.

    Everything goes to standard error, so that standard output holds results only.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)

    def track(self, items: Iterable[ItemT], label: str, total: int) -> Iterator[ItemT]:
        """Yield `items`, showing how many are done and the time left."""
        return self._bar(items, label, total) if self.console.is_terminal else self._lines(items, label, total)

    def say(self, line: str) -> None:
        """Show one line of text."""
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _bar(self, items: Iterable[ItemT], label: str, total: int) -> Iterator[ItemT]:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, transient=True) as progress:
            yield from progress.track(items, total=total, description=label)

    def _lines(self, items: Iterable[ItemT], label: str, total: int) -> Iterator[ItemT]:
        started = last = time.monotonic()
        for done, item in enumerate(items):
            now = time.monotonic()
            if done and now - last >= SECONDS_BETWEEN_LINES:
                left = (now - started) / done * (total - done)
                self.say(f"{label}: {done} of {total}, about {left:.0f} s left")
                last = now
            yield item
        self.say(f"{label}: {total} of {total} in {time.monotonic() - started:.1f} s")


def print_table(
    title: str, header: Sequence[str], rows: Iterable[Sequence[str]], console: Console | None = None
) -> None:
    """Print a table to standard output; the first column is text, the others are numbers.

    Where standard output is no terminal, columns are separated by tabs, so that the table can be cut and pasted.
    """
    console = console or Console()
    if not console.is_terminal:
        lines = [title] if title else []
        lines += ["\t".join(row) for row in (header, *rows)]
        console.file.write("".join(f"{line}\n" for line in lines))  # the console itself turns tabs into spaces
        return
    # As `Text`, so that brackets in a name or in a generated text are no markup.
    table = Table(title=Text(title), title_justify="left")
    for position, name in enumerate(header):
        table.add_column(Text(name), justify="right" if position else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)


def number(value: float | None, digits: int = 4) -> str:
    """Return a number for a table; a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}g}"
