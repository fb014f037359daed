"""The code blocks of README.md run, in order, in one folder, as a stranger would type them.

`./model` is the embedded default model, `text.txt` and `eval.txt` are pieces of the embedded texts. A block that cannot
run here says so in a comment on the line before it: `<!-- not run: reason -->`.
"""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from bitmend import assets

README = Path(__file__).parent.parent / "README.md"
SHELLS = {"bash", "sh", "shell", "console"}
MOST_NOT_RUN = 3
# No network; and one thread, because small models on busy cores only wait for more.
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^\n]+?) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class CodeBlock:
    language: str
    text: str
    line: int
    reason: str | None

    def command(self) -> list[str]:
        if self.language == "python":
            return [sys.executable, "-W", "error", "-c", self.text]
        typed = self.text
        if self.language == "console":  # only what stands after the prompt was typed
            typed = "".join(f"{line[2:]}\n" for line in self.text.splitlines() if line.startswith("$ "))
        return ["bash", "-euo", "pipefail", "-c", typed]


def code_blocks() -> list[CodeBlock]:
    text = README.read_text(encoding="utf-8")
    return [
        CodeBlock(match["language"], match["text"], text.count("\n", 0, match.start("text")), match["reason"])
        for match in BLOCK.finditer(text)
        if match["language"] in SHELLS | {"python"}
    ]


def test_blocks_are_found_and_few_are_left_out():
    blocks = code_blocks()
    assert {block.language for block in blocks if block.reason is None} >= {"bash", "python"}
    assert sum(block.reason is not None for block in blocks) <= MOST_NOT_RUN


def test_commands_that_run_are_bitmends():
    for block in code_blocks():
        if block.reason is None and block.language in SHELLS:
            first = block.text.removeprefix("$ ")
            assert first.startswith("bitmend "), f"README.md:{block.line}: not bitmend; say why it is not run"


def test_blocks_run_in_order(tmp_path):
    (tmp_path / "model").symlink_to(assets.path("books-7m"), target_is_directory=True)
    for name, source in (("text.txt", "books-calibration"), ("eval.txt", "books-validation")):
        (tmp_path / name).write_text(assets.path(source).read_text(encoding="utf-8")[:200_000], encoding="utf-8")
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    for block in code_blocks():
        if block.reason is not None:
            continue
        done = subprocess.run(
            block.command(),
            cwd=tmp_path,
            env={**os.environ, **ENVIRONMENT, "PATH": path, "BITMEND_CACHE": str(tmp_path / "cache")},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        shown = f"{done.stdout}\n{done.stderr}"
        assert done.returncode == 0, f"README.md:{block.line} ended with {done.returncode}:\n{shown}"
