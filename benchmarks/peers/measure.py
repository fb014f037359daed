"""Run one script in another interpreter, and watch the memory of it and of all that it starts.

Memory is sampled every 50 ms from /proc, summed over the process and its descendants: resident (`rss`, with mapped files)
and anonymous (`anonymous`, without). Given is the largest sum after the imports, less what the process had when they were
done. Where the kernel allows it, its own record of the largest resident size of the main process is given as well
(`rss_high_water`), which misses nothing between two samples but knows no descendants.
"""

import json
import subprocess
import threading
import time
from pathlib import Path

from protocol import UNITS, UNSUPPORTED, limit_threads, read_status

INTERVAL = 0.05  # seconds
KEPT_LINES = 400


def run_script(python, script, request, folder, *, environment, timeout=None):
    """Return the record of one run: status, reason, seconds, memory, and what the script answered.

    Args:
        python: interpreter.
        script: `quantise.py` of a tool.
        request: for `protocol.Run`, without `answer`.
        folder: where request.json, answer.json and output.txt go, and where the script is started: some tools leave files.
        environment: environment variables.
        timeout: seconds, after which the script is ended and the run has failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    answer = folder / "answer.json"
    answer.unlink(missing_ok=True)
    (folder / "request.json").write_text(json.dumps({**request, "answer": str(answer)}, indent=1) + "\n")
    started = time.perf_counter()
    with (folder / "output.txt").open("wb") as output:
        process = subprocess.Popen(
            [python, script, folder / "request.json"],
            cwd=folder,
            env=limit_threads(environment, request["threads"]),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        sampler = Sampler(process.pid)
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            code = None
        finally:
            sampler.stop()
    record = {"status": "ok", "reason": None, "seconds": {"wall": time.perf_counter() - started}}
    if code != 0 or not answer.exists():
        record["status"] = "unsupported" if code == UNSUPPORTED else "failed"
        record["reason"] = f"stopped after {timeout} s" if code is None else last_line(folder / "output.txt", code)
        return record
    told = json.loads(answer.read_text())
    record["seconds"] |= told.pop("seconds")
    baseline, high_water = told.pop("baseline"), told.pop("high_water")
    record["memory"] = sampler.above(baseline)
    if high_water is not None:
        record["memory"]["rss_high_water"] = high_water - baseline["rss"]
    return {**record, **told}


def last_line(file, code):
    """Return the last line of a script's output that says something: that of the exception, if there was one."""
    lines = [line.strip() for line in file.read_text(errors="replace").splitlines()[-KEPT_LINES:] if line.strip()]
    return lines[-1][:400] if lines else f"ended with exit code {code} and said nothing"


class Sampler:
    """Samples in a thread of its own until it is stopped."""

    def __init__(self, pid):
        self._pid = pid
        self._samples = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def stop(self):
        """End the thread."""
        self._ended.set()
        self._thread.join()

    def above(self, baseline):
        """Return the largest of each size since the time of `baseline`, less its value then; {} without /proc."""
        if baseline["rss"] is None:
            return {}
        since = [sizes for moment, sizes in self._samples if moment >= baseline["time"]]
        return {
            name: max((sizes[name] for sizes in since), default=baseline[name]) - baseline[name] for name in UNITS
        } | {"samples": len(since)}

    def _sample(self):
        seen = {self._pid}
        while not self._ended.wait(INTERVAL):
            alive = family(self._pid)
            sizes = dict.fromkeys(UNITS, 0)
            # A child shares the memory of its parent until it runs a program of its own, a moment later: it counts from the
            # second sample on, lest that memory count twice.
            for pid in seen.intersection(alive):
                for name, key in UNITS.items():
                    sizes[name] += read_status(key, pid) or 0
            seen = {self._pid, *alive}
            self._samples.append((time.time(), sizes))


def family(pid):
    """Return a process and its descendants."""
    found = [pid]
    for parent in found:
        try:
            tasks = list(Path(f"/proc/{parent}/task").iterdir())
            for task in tasks:
                found += [int(child) for child in (task / "children").read_text().split()]
        except OSError:  # it has just ended
            continue
    return found
