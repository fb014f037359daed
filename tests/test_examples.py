"""Each example runs on a CPU within a minute or so, and prints the line that its docstring promises.

The promise is the line `Prints: REGULAR EXPRESSION` of the docstring. Its named groups are numbers; `SENSIBLE` says
what must hold between them.
"""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"

# No network; and one thread, because small models on busy cores only wait for more.
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

SENSIBLE: dict[str, Callable[[Mapping[str, float]], bool]] = {
    "quantize_and_compare": lambda number: 0 < number["gptq"] < number["rtn"],
    "write_your_own_solver": lambda number: 0 < number["coordinate"] < number["rtn"],
}


def promise(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    match = re.search(r"^Prints: (.+)$", docstring, re.MULTILINE)
    assert match, f"{path.name}: its docstring must hold a line `Prints: REGULAR EXPRESSION`"
    return match[1]


def test_every_example_has_its_check():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(SENSIBLE)


@pytest.mark.parametrize("name", sorted(SENSIBLE))
def test_example_prints_what_it_promises(name, tmp_path):
    path = EXAMPLES / f"{name}.py"
    pattern = re.compile(promise(path), re.MULTILINE)
    assert pattern.groupindex, f"{path.name}: name the numbers in its promise, (?P<gptq>...) for example"
    done = subprocess.run(
        [sys.executable, "-W", "error", str(path)],
        cwd=tmp_path,
        env={**os.environ, **ENVIRONMENT, "TMPDIR": str(tmp_path), "BITMEND_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    match = pattern.search(done.stdout)
    assert match, f"{pattern.pattern!r} is not in:\n{done.stdout}"
    numbers = {key: float(value) for key, value in match.groupdict().items()}
    assert SENSIBLE[name](numbers), numbers
