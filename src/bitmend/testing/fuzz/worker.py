"""Runs cases in a process of its own, with a limit on memory and time, that is started again when it dies.

`python -m bitmend.testing.fuzz.worker PLACE` reads numbers of cases, one a line, and answers each with a line of JSON.
"""

import faulthandler
import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from bitmend.testing.fuzz.verdicts import Verdict

MEMORY_BYTES = 2 << 30
SECONDS = 30.0
STARTING_SECONDS, ENDING_SECONDS = 300.0, 30.0
READY = "ready"


class Worker:
    """A process that judges cases; use it as a context manager."""

    def __init__(self, place: Path, *, seconds: float = SECONDS, memory_bytes: int = MEMORY_BYTES) -> None:
        """Use the folders in `place/folders`.

        Args:
            place: a folder of its own.
            seconds: what a case may take; what takes longer is `hung`.
            memory_bytes: what a case may take beyond what the process has when it is ready, in addresses.
        """
        self.place, self.seconds, self.memory_bytes = place, seconds, memory_bytes
        self._process: subprocess.Popen[str] | None = None
        self._log: IO[str] | None = None

    def __enter__(self) -> "Worker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def judge(self, seeds: Iterable[int]) -> Iterator[tuple[Verdict, float]]:
        """Yield the verdict of each case and how many seconds it took."""
        for seed in seeds:
            process = self._running()
            assert process.stdin is not None
            started = time.perf_counter()
            process.stdin.write(f"{seed}\n")
            process.stdin.flush()
            answer = self._answer(process, self.seconds)
            spent = time.perf_counter() - started
            if answer is not None:
                yield Verdict(**{**answer, "mutations": tuple(answer["mutations"])}), spent
                continue
            hung = spent >= self.seconds
            if hung:
                process.send_signal(signal.SIGUSR1)  # faulthandler writes where it stands
                time.sleep(0.5)
            else:  # it has closed its output, and is about to end
                with suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=ENDING_SECONDS)
            code = self._stop()
            what = "hung" if hung else f"died with {code}"
            yield Verdict(seed, "?", "?", (), what, self._last_words()), spent

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None:
            self._log = (self.place / "worker.log").open("w+")
            command = [sys.executable, "-m", "bitmend.testing.fuzz.worker", str(self.place), str(self.memory_bytes)]
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
                env=os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
            )  # fmt: skip
            if self._answer(self._process, STARTING_SECONDS) != READY:
                self._stop()
                raise RuntimeError(f"the worker did not start: {self._last_words()}")
        return self._process

    def _answer(self, process: subprocess.Popen[str], seconds: float) -> Any:
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], seconds)
        line = process.stdout.readline() if ready else ""
        return json.loads(line) if line else None

    def _stop(self) -> int | None:
        if self._process is None:
            return None
        process, self._process = self._process, None
        process.kill()
        code = process.wait()
        for pipe in (process.stdin, process.stdout, self._log):
            if pipe is not None:
                pipe.close()
        return code

    def _last_words(self) -> str:
        lines = (self.place / "worker.log").read_text(errors="replace").splitlines()
        ours = [line.strip() for line in lines if "bitmend" in line] or lines[-3:]
        return " < ".join(line.rpartition("bitmend/")[2] for line in ours[-40:][:6])[:500]


def _addresses() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def main(place: Path, memory_bytes: int) -> None:
    """Answer cases until standard input ends."""
    import torch
    import transformers

    from bitmend.testing.fuzz.verdicts import Judge

    faulthandler.register(signal.SIGUSR1)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer

    def answer(content: Any) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    judge = Judge(place)
    judge.expected("plain", "load")
    resource.setrlimit(resource.RLIMIT_AS, (_addresses() + memory_bytes,) * 2)
    answer(READY)
    for line in sys.stdin:
        answer(asdict(judge.judge(int(line))))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
