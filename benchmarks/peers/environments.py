"""One virtual environment for each peer, below `.venv-peers/`, from its requirements.txt.

torch goes first and alone: pip takes a CPU build where one lies ready, and its index's default build elsewhere. The build
that came is then a constraint, to the letter, for everything else. A finished environment is kept until its
requirements change.
"""

import argparse
import hashlib
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
PEERS = ("gptqmodel", "llm-compressor", "auto-round", "hqq")
STAMP = "finished.txt"
PRINT_TORCH = 'import importlib.metadata as m; print("torch==" + m.version("torch"))'


class InstallError(Exception):
    """A peer's environment could not be made; the message is one line."""


def interpreter(root, peer):
    """Return the Python of a peer's environment, whether it is there or not."""
    return root / peer / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def is_ready(root, peer):
    """Return whether the environment was finished with the requirements as they are now."""
    stamp = root / peer / STAMP
    return stamp.is_file() and stamp.read_text().strip() == _digest(peer)


def make(root, peer, torch_index=None):
    """Make a peer's environment unless it is ready, and return its Python.

    Raises:
        InstallError: pip failed; its log lies in the environment.
    """
    python = interpreter(root, peer)
    if is_ready(root, peer):
        return python
    folder = root / peer
    if not python.exists():
        venv.create(folder, with_pip=True)
    log = folder / "install.txt"
    log.unlink(missing_ok=True)
    requirements = HERE / peer / "requirements.txt"
    torch = _pinned_torch(requirements)
    _pip(python, log, [*(("--index-url", torch_index) if torch_index else ()), torch])
    constraint = folder / "torch-constraint.txt"
    constraint.write_text(
        subprocess.run([python, "-c", PRINT_TORCH], capture_output=True, text=True, check=True).stdout
    )
    _pip(python, log, ["--constraint", constraint, "--requirement", requirements])
    (folder / STAMP).write_text(_digest(peer) + "\n")
    return python


def _pip(python, log, arguments):
    command = [python, "-m", "pip", "install", "--disable-pip-version-check", *arguments]
    with log.open("ab") as output:
        code = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT).returncode
    if code:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.startswith("ERROR")]
        raise InstallError(f"pip ended with exit code {code}: {lines[-1] if lines else 'no message'} (log: {log})")


def _pinned_torch(requirements):
    for line in requirements.read_text().splitlines():
        if re.match(r"torch==", line):
            return line.split()[0]
    raise InstallError(f"{requirements} does not pin torch")


def _digest(peer):
    return hashlib.sha256((HERE / peer / "requirements.txt").read_bytes()).hexdigest()


def main():
    """Make the environments; exit code 1 if one of them could not be made."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--root", type=Path, default=HERE.parents[1] / ".venv-peers")
    parser.add_argument("--peers", nargs="*", default=PEERS, choices=PEERS)
    parser.add_argument(
        "--torch-index", help="where pip looks for torch, for example PyTorch's address of a CUDA build"
    )
    options = parser.parse_args()
    failed = False
    for peer in options.peers:
        try:
            was_ready = is_ready(options.root, peer)
            make(options.root, peer, options.torch_index)
            print(f"{peer}: {'ready' if was_ready else 'made'}")
        except (InstallError, OSError, subprocess.SubprocessError) as error:
            failed = True
            print(f"{peer}: {error}")
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
