"""Who is compared: each method of each tool once as it comes, and where that matters once at its best."""

from dataclasses import dataclass, field

OURS = "bitmend"


@dataclass(frozen=True)
class Contestant:
    """One row of the table.

    Attributes:
        tool: folder of its `quantise.py`.
        method: what the script is asked for.
        label: what tables call it beside the tool.
        settings: keys for the script.
        uses_rows: whether it reads calibration rows, so that draws differ.
    """

    tool: str
    method: str
    label: str
    settings: dict = field(default_factory=dict)
    uses_rows: bool = True

    @property
    def name(self):
        """Return tool and label."""
        return f"{self.tool} {self.label}"


ACCURACY = (
    Contestant(OURS, "rtn", "rtn", uses_rows=False),
    Contestant(OURS, "gptq", "gptq"),
    Contestant("gptqmodel", "gptq", "gptq"),
    Contestant("llm-compressor", "gptq", "gptq"),
    Contestant(OURS, "gptaq", "gptaq"),
    Contestant("gptqmodel", "gptaq", "gptaq"),
    Contestant(OURS, "marr", "marr"),
    Contestant(OURS, "descent", "descent"),
    Contestant("hqq", "hqq", "hqq", uses_rows=False),
    Contestant("auto-round", "signround", "200 steps", {"iters": 200}),
    # With a search for scales, as bitmend has by default: the same exponent for GPTQModel, its own for llm-compressor.
    Contestant("gptqmodel", "gptq", "gptq, scale search", {"mse": 2.4}),
    Contestant("llm-compressor", "gptq", "gptq, scale search", {"weights": {"observer": "mse"}}),
)

# What `--tune` found fast without more memory: batches of 8 are 5 % faster and take 19 % more (docs/results, page on
# peers). On a CPU with fast bfloat16 units another type may be.
FASTEST = {"variant": "plain", "dtype": "float32"}
# As much work as theirs: no search for scales, one fit; one row is held out for the proof (without any, the full-precision
# network would run on all rows for the error after each block).
LIKE_THEIRS = {"calibration.held_out": 1 / 32, "calibration.refit": False, "weights.observer": "minmax"}

TIMING = (
    Contestant(OURS, "gptq", "gptq"),
    Contestant("gptqmodel", "gptq", "gptq", FASTEST),
    Contestant(OURS, "gptq", "gptq, one fit, no search", LIKE_THEIRS),
    Contestant(OURS, "gptq", "gptq, one fit, no search, low memory", {**LIKE_THEIRS, "low_memory": True}),
    Contestant(OURS, "gptaq", "gptaq"),
    Contestant("gptqmodel", "gptaq", "gptaq", FASTEST),
    Contestant(OURS, "gptaq", "gptaq, one fit, no search", LIKE_THEIRS),
)

TUNE = tuple(
    Contestant("gptqmodel", method, f"{method}: {label}", settings)
    for method in ("gptq", "gptaq")
    for label, settings in (
        ("defaults", {}),
        ("plain", {"variant": "plain"}),
        ("plain, float32", {"variant": "plain", "dtype": "float32"}),
        ("plain, batches of 8", {"variant": "plain", "batch_size": 8}),
        ("plain, float32, batches of 8", {"variant": "plain", "dtype": "float32", "batch_size": 8}),
        ("plain, one worker", {"variant": "plain", "workers": 1}),
    )
)
