import io

import pytest
from rich.console import Console

from bitmend.protocols import Progress
from bitmend.report import terminal
from bitmend.report.terminal import TerminalProgress, number, print_table


def console(is_terminal, width=80):
    return Console(file=io.StringIO(), force_terminal=is_terminal, width=width, color_system=None)


def shown(target):
    return target.file.getvalue()


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when a test says so."""

    class Clock:
        now = 100.0

    monkeypatch.setattr(terminal.time, "monotonic", lambda: Clock.now)
    return Clock


def test_it_is_a_progress():
    assert isinstance(TerminalProgress(), Progress)


def test_it_speaks_on_standard_error(capsys):
    progress = TerminalProgress()
    progress.say("hello")
    assert list(progress.track([1, 2], "work", 2)) == [1, 2]
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[0] == "hello"
    assert captured.err.splitlines()[-1].startswith("work: 2 of 2 in ")


@pytest.mark.parametrize("line", ["[bold]a[/bold] [/x] 12 'b'", "x" * 200])
def test_lines_are_shown_as_they_are(line):
    target = console(False)
    TerminalProgress(target).say(line)
    assert shown(target) == line + "\n"


def test_elsewhere_a_line_now_and_then(clock):
    target = console(False)
    for item in TerminalProgress(target).track(range(4), "blocks", 4):
        clock.now += (3.0, 9.0, 9.0, 0.0)[item]
    # After 3 s nothing; after 12 s two are done, hence 12 more; 9 s later nothing; at the end the total.
    assert shown(target).splitlines() == ["blocks: 2 of 4, about 12 s left", "blocks: 4 of 4 in 21.0 s"]


def test_items_are_asked_for_one_at_a_time():
    taken = []

    def items():
        for item in range(3):
            taken.append(item)
            yield item

    stream = TerminalProgress(console(False)).track(items(), "x", 3)
    next(stream)
    assert taken == [0]


def test_an_error_passes_through_and_no_end_is_announced():
    target = console(False)

    def items():
        yield 1
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        list(TerminalProgress(target).track(items(), "x", 2))
    assert shown(target) == ""


def test_on_a_terminal_a_bar():
    target = console(True)
    assert list(TerminalProgress(target).track([1, 2, 3], "blocks", 3)) == [1, 2, 3]
    assert "blocks" in shown(target)
    assert "3/3" in shown(target)


# ------------------------------------------------------------------------------------------------ tables
def test_elsewhere_columns_are_tabs():
    target = console(False, width=20)
    print_table("a title", ("name", "bits"), [["a", "3"], ["[b] " + "long" * 20, "4"]], target)
    assert shown(target) == "a title\nname\tbits\na\t3\n[b] " + "long" * 20 + "\t4\n"


def test_a_table_without_title_begins_with_its_header(capsys):
    print_table("", ("name",), [["a"]])
    assert capsys.readouterr().out == "name\na\n"


def test_on_a_terminal_text_is_left_and_numbers_are_right():
    target = console(True, width=60)
    print_table("a title", ("name", "bits"), [["a", "3"], ["bbbbbbb", "14.25"]], target)
    lines = shown(target).splitlines()
    assert lines[0].strip() == "a title"
    assert any("│ a       │     3 │" in line for line in lines)
    assert any("│ bbbbbbb │ 14.25 │" in line for line in lines)


def test_brackets_are_no_markup_on_a_terminal():
    target = console(True, width=60)
    print_table("[bold]title", ("[red]name",), [["he said [/b] and [bold]left"]], target)
    for text in ("[bold]title", "[red]name", "he said [/b] and [bold]left"):
        assert text in shown(target)


def test_a_long_cell_is_folded_and_not_cut():
    target = console(True, width=30)
    print_table("", ("name", "bits"), [["x" * 60, "4"]], target)
    assert shown(target).count("x") == 60


@pytest.mark.parametrize(
    ("value", "digits", "expected"),
    [(None, 4, "-"), (0.0, 4, "0"), (12.3456, 4, "12.35"), (1.5e-7, 2, "1.5e-07"), (1234567.0, 6, "1.23457e+06")],
)
def test_number(value, digits, expected):
    assert number(value, digits) == expected
