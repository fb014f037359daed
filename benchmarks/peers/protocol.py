"""What the driver and a `quantise.py` say to each other. Standard library only: it runs in every peer's environment.

The driver starts `PYTHON quantise.py REQUEST.json` and reads the file that the request names under `answer`:

| key          | what                                                                                       |
|--------------|--------------------------------------------------------------------------------------------|
| `checkpoint` | folder of the quantised model, below `output`                                              |
| `reader`     | `quantized`: bitmend's readers of other tools' files; `folder`: any plain or bitmend folder |
| `seconds`    | wall time of `imports`, `load`, `quantise`, `save`; `solver` where the tool tells it       |
| `cpu`        | processor time of the same phases, all threads; on a busy machine the steadier number      |
| `baseline`   | own memory when the imports were done, in bytes: `rss`, `anonymous`                        |
| `high_water` | the kernel's own record of the largest `rss` since then, or null where it cannot be reset  |
| `versions`   | of the packages that the result depends on                                                 |
| `rows`       | SHA-256 and shape of the calibration rows that were read                                   |
| `settings`   | what the tool was told beside bits and group size                                          |
| `notes`      | more numbers that only this tool has, such as its own count of bits                        |

A script that fails lets its exception out: the driver keeps the last line of it as the reason. One that cannot do what is
asked calls `unsupported`, which is told apart from a failure by its exit code.
"""

import hashlib
import json
import os
import sys
import time
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

UNSUPPORTED = 3  # exit code
UNITS = {"rss": "VmRSS", "anonymous": "RssAnon"}


class Run:
    """One request while it is carried out.

    Attributes:
        model: folder of the full-precision model.
        rows: .npy file, int64 (rows, length); None for a method without data.
        method: for example `gptq`.
        bits, group_size: of the codes.
        threads: of torch.
        settings: more keys for the tool.
        output: folder that the script may fill; it exists and is empty.
    """

    def __init__(self, request):
        """Keep what is asked, and start the clock."""
        self._request = request
        self._answer = {"seconds": {}, "cpu": {}, "versions": {}, "settings": request["settings"], "notes": {}}
        self._phase_started = time.perf_counter(), 0.0
        self.model, self.output = Path(request["model"]), Path(request["output"])
        self.rows = None if request["rows"] is None else Path(request["rows"])
        self.method, self.bits, self.group_size = request["method"], request["bits"], request["group_size"]
        self.threads, self.settings = request["threads"], request["settings"]

    def imports_done(self, *packages):
        """Close the phase of imports: memory is counted from here. `packages` are those whose versions matter.

        The code of the model's architecture is imported first, because some tools import it with themselves and others
        when they load the model.
        """
        import torch  # not above: a script may have to set variables before it
        import transformers

        transformers.AutoModelForCausalLM._model_mapping[type(transformers.AutoConfig.from_pretrained(self.model))]
        torch.set_num_threads(self.threads)
        self._answer["versions"] = {name: version(name) for name in ("torch", "transformers", *packages)}
        self._close_phase("imports")
        self.take_baseline()

    def take_baseline(self):
        """Count memory from here."""
        self._answer["high_water_reset"] = reset_high_water()
        self._answer["baseline"] = own_memory()
        self._answer["baseline"]["time"] = time.time()

    @contextmanager
    def phase(self, name):
        """Time `load`, `quantise` or `save`."""
        self._phase_started = time.perf_counter(), processor_seconds()
        yield
        self._close_phase(name)

    def split(self, name, **parts):
        """Replace one phase by `parts` in seconds; `save` is what they leave of it. Processor time stays whole."""
        whole = self._answer["seconds"].pop(name)
        self._answer["seconds"] |= {**parts, "save": whole - sum(parts.values())}

    def load_rows(self):
        """Return the calibration rows as an int64 array (rows, length)."""
        import numpy as np

        rows = np.load(self.rows, allow_pickle=False)
        if rows.dtype != np.int64 or rows.ndim != 2:
            raise ValueError(f"rows must be int64 of shape (rows, length), not {rows.dtype} {rows.shape}")
        digest = hashlib.sha256(np.ascontiguousarray(rows).tobytes()).hexdigest()
        self._answer["rows"] = {"sha256": digest, "shape": list(rows.shape)}
        return rows

    def note(self, **values):
        """Keep more numbers of this tool."""
        self._answer["notes"].update(values)

    def told(self, **values):
        """Keep settings that the script itself passed to the tool."""
        self._answer["settings"] = {**self._answer["settings"], **values}

    def solver_seconds(self, seconds):
        """Keep the time that the tool says it spent in solving, of all matrices together."""
        self._answer["seconds"]["solver"] = seconds

    def finish(self, checkpoint, reader):
        """Write the answer. `reader` is `quantized` or `folder`."""
        if self._answer.pop("high_water_reset"):
            self._answer["high_water"] = read_status("VmHWM")
        else:
            self._answer["high_water"] = None
        self._answer["checkpoint"] = str(Path(checkpoint).resolve().relative_to(self.output.resolve()))
        self._answer["reader"] = reader
        Path(self._request["answer"]).write_text(json.dumps(self._answer, indent=1) + "\n")

    def _close_phase(self, name):
        wall, processor = self._phase_started
        self._answer["seconds"][name] = time.perf_counter() - wall
        self._answer["cpu"][name] = processor_seconds() - processor


def start():
    """Return the run that the command line asks for. To be called before anything large is imported."""
    return Run(json.loads(Path(sys.argv[1]).read_text()))


def unsupported(reason):
    """End the script: the tool cannot do what is asked."""
    print(reason, file=sys.stderr)
    raise SystemExit(UNSUPPORTED)


def processor_seconds():
    """Return the processor time of this process and of its ended children."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def own_memory():
    """Return the memory of this process in bytes; nothing where there is no /proc."""
    return {name: read_status(key) for name, key in UNITS.items()}


def read_status(key, pid="self"):
    """Return one size of /proc/PID/status in bytes, or None."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def reset_high_water():
    """Make the kernel forget how large this process has been; return whether it did."""
    try:
        with open("/proc/self/clear_refs", "w") as file:  # noqa: PTH123 - no file in the usual sense
            file.write("5")
    except OSError:
        return False
    return read_status("VmHWM") is not None


def limit_threads(environment, threads):
    """Return an environment in which numerical libraries start with `threads` threads."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
    return {**environment, **dict.fromkeys(names, str(threads))}


def cpu_count():
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
