"""What the strength loop of `marr` does, matrix by matrix: convergence, gains, spread, and whether its aim is the right one.

    python benchmarks/study_marr.py loops --model books-7m --bits 3 --group-size -1 --output out/loops-w3
    python benchmarks/study_marr.py gains --model books-7m --bits 3 --group-size -1 --output out/gains-w3
    python benchmarks/study_marr.py swap  --model books-7m --bits 3 --group-size -1 --output out/swap-w3
    python benchmarks/study_marr.py aim   --model books-7m --bits 2 --group-size 64 --output out/aim-w2
    python benchmarks/study_marr.py forms --model books-7m --bits 2 --group-size 64 --output out/forms-w2
    python benchmarks/study_marr.py tokens --model books-7m --bits 2 --group-size 64 --output out/tokens-w2
    python benchmarks/study_marr.py ends   --model books-7m --bits 2 --group-size 64 --output out/ends-w2

`loops`: how the loops ended, overshoot, plant gain, strengths by kind and depth of layer. `gains`: the same matrices (their
moments are kept from one run) solved again under other gains. `swap`: the same strengths shuffled among the matrices, or all
set to their mean, against those found; KL. `aim`: on ten matrices, held-out error and KL of the whole model as functions of
the strength of that matrix alone. `forms`: the same matrices solved by each form at several strengths: held-out error beside
how far the weights move, and how many codes lie at an end of the grid. `tokens`: which tokens the errors of some matrices lie
on, at several strengths: all of them, the 1 % with the largest inputs, the others, and each token by its own energy. KL is on
books-validation. `ends`: the error of the last hidden state beside the divergence, on the calibration text and on others, for
gptq and both forms of marr. All write OUTPUT/result.json and print Markdown.
"""

import argparse
import itertools
import json
import math
import random
import shutil
import statistics
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import torch

import bitmend
from bitmend import assets
from bitmend.evaluate.agreement import kl_divergence
from bitmend.evaluate.load import LoadedModel, load_model
from bitmend.evaluate.windows import read_windows
from bitmend.linalg.strength import StrengthMeter, StrengthSolver
from bitmend.protocols import SOLVERS, Need, Problem, Solution
from bitmend.solvers.marr import Marr

PROBLEMS: dict[str, Problem] = {}
SCANS: dict[str, list[dict]] = {}
NEEDS = frozenset({Need.INPUT_MOMENT, Need.CROSS_MOMENT, Need.RESIDUAL_MOMENT, Need.HELD_OUT})


@SOLVERS.register("study_capture", paper="none")
@dataclass(frozen=True)
class Capture:
    """`marr`, which also keeps every problem."""

    needs: ClassVar[frozenset[Need]] = NEEDS
    form: str = "shift"

    def solve(self, problem: Problem) -> Solution:
        # A float32 model's weight is the parameter itself, which the engine overwrites.
        PROBLEMS[problem.site.name] = replace(problem, weight=problem.weight.clone(), _known={})
        return Marr(form=self.form).solve(problem)


@SOLVERS.register("study_given", paper="none")
@dataclass(frozen=True)
class Given:
    """Strengths read from a file: site name to strength."""

    needs: ClassVar[frozenset[Need]] = NEEDS
    form: str = "shift"
    file: str = ""

    def solve(self, problem: Problem) -> Solution:
        strength = json.loads(Path(self.file).read_text())[problem.site.name]
        moments = problem.everything or problem.fit
        solver = StrengthSolver(problem.weight, problem.spec, moments, form=self.form, damping=0.01, order="diagonal")
        return Solution(solver.solve([strength])[0], {"residual_strength": strength})


@SOLVERS.register("study_scan", paper="none")
@dataclass(frozen=True)
class Scan:
    """`marr`, which also keeps the solutions at several strengths (of all rows) and their held-out errors (of fit rows)."""

    needs: ClassVar[frozenset[Need]] = NEEDS
    form: str = "shift"
    sites: tuple[str, ...] = ()
    strengths: tuple[float, ...] = (0.0, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9, 1.0)

    def solve(self, problem: Problem) -> Solution:
        solution = Marr(form=self.form).solve(problem)
        if problem.site.name in self.sites:
            keys = {"form": self.form, "damping": 0.01, "order": "diagonal"}
            fit = StrengthSolver(problem.weight, problem.spec, problem.fit, **keys)
            meter = StrengthMeter(problem.weight, fit.direction(), problem.held_out)
            final = StrengthSolver(problem.weight, problem.spec, problem.everything, **keys)
            errors = [meter.measure(q.dequantize(torch.float64)).error for q in fit.solve(self.strengths)]
            SCANS[problem.site.name] = [
                {"strength": a, "error": error, "weight": q.dequantize()}
                for a, error, q in zip(self.strengths, errors, final.solve(self.strengths), strict=True)
            ]
        return solution


@dataclass
class Study:
    """One setting, and where its results go."""

    options: argparse.Namespace
    result: dict = field(default_factory=dict)

    def quantise(self, solver, **keys):
        """Quantise into OUTPUT/model and return the report."""
        options = self.options
        given = {f"solver.{key}": value for key, value in keys.items()}
        given |= {"solver.name": solver, "weights.bits": options.bits, "weights.group_size": options.group_size}
        given |= {"calibration.sequences": 128, "calibration.sequence_length": 512, "calibration.held_out": 0.25}
        given |= {"calibration.seed": options.draw, "calibration.two_streams": True}
        rows = [assets.path("books-calibration")]
        model = assets.path(options.model)
        return bitmend.quantize(model, "gptq", rows, output=options.output / "model", overrides=given, overwrite=True)

    def kl(self, model):
        """Return the KL of a folder or a loaded model on books-validation."""
        texts, reference = [assets.path("books-validation")], assets.path(self.options.model)
        scores = bitmend.evaluate([model], texts=texts, reference=reference, windows=self.options.windows)
        return scores.models[0].texts[0].kl

    def finish(self):
        """Write the numbers."""
        shutil.rmtree(self.options.output / "model", ignore_errors=True)
        (self.options.output / "result.json").write_text(json.dumps(self.result, indent=1))


def loop_summary(reports):
    """Return how loops ended, from the diagnostics of some sites."""
    stops = Counter(d["stop"] for d in reports)
    passes = [d["passes"] for d in reports]
    overshoot, turns, gains = [], [], []
    for d in reports:
        walk = [step for step in d["steps"] if not math.isnan(step["feedback"])]
        if len(walk) > 1:
            strengths = [step["strength"] for step in walk]
            rising = strengths[-1] >= strengths[0]
            extreme = max(strengths) if rising else min(strengths)
            overshoot.append(abs(extreme - strengths[-1]))
            feedback = [step["feedback"] for step in walk]
            turns.append(sum(a * b < 0 for a, b in itertools.pairwise(feedback)))
        points = [(step["strength"], step["projection"]) for step in d["steps"]]
        mean_a, mean_e = (statistics.fmean(column) for column in zip(*points, strict=True))
        spread = sum((a - mean_a) ** 2 for a, _ in points)
        if spread > 1e-6:
            gains.append(-sum((a - mean_a) * (e - mean_e) for a, e in points) / spread)
    at_zero = [min(d["steps"], key=lambda step: step["strength"]) for d in reports]
    return {
        "sites": len(reports),
        "stops": dict(stops),
        "passes": statistics.fmean(passes),
        "overshoot_max": max(overshoot, default=0.0),
        "overshoot_mean": statistics.fmean(overshoot) if overshoot else 0.0,
        "sign_changes_mean": statistics.fmean(turns) if turns else 0.0,
        "plant_gain": [min(gains), statistics.median(gains), max(gains)] if gains else None,
        # How much of the error at strength 0 is left at the chosen strength.
        "error_left": statistics.fmean(
            min(step["error"] for step in d["steps"]) / zero["error"]
            for d, zero in zip(reports, at_zero, strict=True)
            if zero["error"] > 0
        ),
        "last_error_left": statistics.fmean(
            d["steps"][-1]["error"] / zero["error"]
            for d, zero in zip(reports, at_zero, strict=True)
            if zero["error"] > 0
        ),
    }


def loops(study):
    """Run marr once and describe its loops and strengths."""
    report = study.quantise("marr", form=study.options.form)
    sites = [site for block in report.blocks for site in block.sites]
    residual = [site for site in sites if site.diagnostics["stop"] != "no residual"]
    study.result = loop_summary([site.diagnostics for site in residual])
    study.result["kl"] = study.kl(study.options.output / "model")
    kinds, depths = {}, {}
    for block_index, block in enumerate(report.blocks):
        for site in block.sites:
            strength = site.diagnostics["residual_strength"]
            kinds.setdefault(site.name.rpartition(".")[2], []).append(strength)
            if site in residual:
                depths.setdefault(block_index, []).append(strength)
    study.result["by_kind"] = kinds
    study.result["by_depth"] = depths
    study.result["closed_form"] = [site.diagnostics["closed_form_strength"] for site in residual]
    study.result["chosen"] = [site.diagnostics["residual_strength"] for site in residual]
    print(json.dumps({key: value for key, value in study.result.items() if not isinstance(value, list)}, indent=1))
    print("| layer | " + " | ".join(f"block {b}" for b in range(len(report.blocks))) + " | mean | standard deviation |")
    for kind, values in kinds.items():
        cells = " | ".join(f"{value:.2f}" for value in values)
        print(f"| {kind} | {cells} | {statistics.fmean(values):.2f} | {statistics.stdev(values):.2f} |")


def gains(study):
    """Solve the matrices of one run again under other gains and signals."""
    study.quantise("study_capture", form=study.options.form)
    problems = [replace(problem, everything=None) for problem in PROBLEMS.values()]
    sets = {f"{kp}, {ki}, {kd}": {"kp": kp, "ki": ki, "kd": kd} for kp, ki, kd in GAINS}
    for signal in ("projection", "secant"):
        sets[f"default, {signal}"] = {"signal": signal}
    for start in ("global", "zero"):
        sets[f"default, start {start}"] = {"start": start}
    print("| kp, ki, kd | error left, guard | error left, last | passes | sign changes | overshoot, max | stops |")
    print("|---|---|---|---|---|---|---|")
    for name, keys in sets.items():
        marr = Marr(form=study.options.form, **keys)
        diagnostics = [marr.solve(problem).diagnostics for problem in problems]
        summary = loop_summary([d for d in diagnostics if d["stop"] != "no residual"])
        study.result[name] = summary
        stops = ", ".join(f"{count} {stop}" for stop, count in summary["stops"].items())
        print(
            f"| {name} | {summary['error_left']:.4f} | {summary['last_error_left']:.4f} | {summary['passes']:.1f} "
            f"| {summary['sign_changes_mean']:.2f} | {summary['overshoot_max']:.2f} | {stops} |",
            flush=True,
        )


GAINS = [
    (0.2, 0.6, 0.05),
    *itertools.product((0.0, 0.2, 0.5), (0.3, 0.6, 0.9), (0.0, 0.2)),
    (0.5, 0.0, 0.0),
    (0.5, 1.2, 0.1),
    (1.0, 2.0, 0.5),
]


def swap(study):
    """Compare the found strengths with the same numbers shuffled, and with their mean."""
    report = study.quantise("marr", form=study.options.form)
    found = {
        site.name: site.diagnostics["residual_strength"]
        for block in report.blocks
        for site in block.sites
        if site.diagnostics["stop"] != "no residual"
    }
    zeros = {
        site.name: 0.0 for block in report.blocks for site in block.sites if site.diagnostics["stop"] == "no residual"
    }
    mean = statistics.fmean(found.values())
    sets = {"found": found, "mean": dict.fromkeys(found, mean)}
    for seed in range(study.options.repeats):
        values = list(found.values())
        random.Random(seed).shuffle(values)
        sets[f"shuffled {seed}"] = dict(zip(found, values, strict=True))
    file = study.options.output / "strengths.json"
    study.result = {"mean_strength": mean, "deviation": statistics.stdev(found.values())}
    for name, strengths in sets.items():
        file.write_text(json.dumps(strengths | zeros))
        study.quantise("study_given", form=study.options.form, file=str(file))
        study.result[name] = study.kl(study.options.output / "model")
        print(f"| {name} | {study.result[name]:.5f} |", flush=True)


def aim(study):
    """Scan the strength of ten matrices, one at a time, in a model quantised by marr."""
    names = site_names(study)
    chosen = sorted(random.Random(0).sample(names, 10), key=names.index)
    study.quantise("study_scan", form=study.options.form, sites=chosen)
    loaded = load_model(study.options.output / "model", "cpu", torch.float32)
    print(
        "| matrix | best for held-out error | best for KL | KL at the first over KL at the second | rank correlation |"
    )
    print("|---|---|---|---|---|")
    for name, points in SCANS.items():
        layer = loaded.model.get_submodule(name)
        for point in points:
            with replaced(layer, point.pop("weight")):
                point["kl"] = study.kl(LoadedModel("scan", loaded.model, loaded.tokenizer))
        by_error, by_kl = (min(points, key=lambda point, key=key: point[key]) for key in ("error", "kl"))
        correlation = rank_correlation([p["error"] for p in points], [p["kl"] for p in points])
        study.result[name] = {"points": points, "rank_correlation": correlation}
        print(
            f"| {name} | {by_error['strength']:.2f} | {by_kl['strength']:.2f} | {by_error['kl'] / by_kl['kl']:.4f} "
            f"| {correlation:+.2f} |",
            flush=True,
        )


def tokens(study):
    """Tell which tokens the error of some matrices lies on, at several strengths, in a model quantised by marr."""
    chosen = [f"model.layers.{place}" for place in study.options.sites]
    study.quantise("study_scan", form=study.options.form, sites=chosen)
    quantised = load_model(study.options.output / "model", "cpu", torch.float32)
    full = load_model(assets.path(study.options.model), "cpu", torch.float32)
    windows = read_windows(
        assets.path("books-validation"), full.tokenizer, windows=study.options.windows, window_length=512
    )
    print(
        "| matrix | energy of inputs on 1 % of tokens | strength | error | on that 1 % | on the others "
        "| by each token's own energy | KL |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name, points in SCANS.items():
        x_q, x_fp = (inputs_of(model, name, windows) for model in (quantised, full))
        wanted = torch.nn.functional.linear(x_fp, full.model.get_submodule(name).weight.detach())
        energy, inputs = wanted.square().sum(1), x_fp.square().sum(1)
        large = inputs >= inputs.kthvalue(len(inputs) - len(inputs) // 100).values
        share = float(inputs[large].sum() / inputs.sum())
        layer = quantised.model.get_submodule(name)
        for point in points:
            error = (torch.nn.functional.linear(x_q, point["weight"]) - wanted).square().sum(1)
            parts = [error.sum() / energy.sum(), error[large].sum() / energy.sum(), error[~large].sum() / energy.sum()]
            parts = [float(part) for part in (*parts, (error / energy).mean())]
            with replaced(layer, point.pop("weight")):
                kl = study.kl(LoadedModel("scan", quantised.model, quantised.tokenizer))
            point |= {"errors": parts, "kl": kl}
            cells = " | ".join(f"{part:.4f}" for part in parts)
            print(f"| {name} | {share:.2f} | {point['strength']:.2f} | {cells} | {kl:.5f} |", flush=True)
        study.result[name] = {"share": share, "points": points}


def ends(study):
    """Tell how the error of the last hidden state and the divergence go together, on several texts."""
    settings = {"gptq": ("gptq", {}), "gptaq 0.25": ("gptaq", {}), "gptaq 0.75": ("gptaq", {"residual_strength": 0.75})}
    settings |= {"marr, gptaq form": ("marr", {"form": "gptaq"}), "marr": ("marr", {"form": "shift"})}
    full = load_model(assets.path(study.options.model), "cpu", torch.float32)
    head = full.model.get_output_embeddings()
    norm = full.model.model.norm
    print(
        "| method | text | hidden error | after the norm, by token | its part along the hidden state | first 4 tokens | KL "
        "| without the worst 1 % of tokens |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name, (solver, keys) in settings.items():
        study.quantise(solver, **keys)
        quantised = load_model(study.options.output / "model", "cpu", torch.float32)
        for text in ("books-calibration", "books-validation", "wikitext2-valid"):
            windows = read_windows(assets.path(text), full.tokenizer, windows=study.options.windows, window_length=512)
            x_q, x_fp = (inputs_of(model, "model.norm", windows) for model in (quantised, full))
            with torch.no_grad():
                y_q, y_fp = quantised.model.model.norm(x_q), norm(x_fp)
                kl = torch.cat(
                    [kl_divergence(head(a), head(b)) for a, b in zip(y_fp.split(512), y_q.split(512), strict=True)]
                )
            error = y_q - y_fp
            along = (error * y_fp).sum(1).square() / y_fp.square().sum(1)
            first = (torch.arange(len(x_q)) % 512) < 4
            squares = (x_q - x_fp).square().sum(1)
            numbers = {
                "hidden": squares.sum() / x_fp.square().sum(),
                "by_token": (error.square().sum(1) / y_fp.square().sum(1)).mean(),
                "along": along.sum() / error.square().sum(),
                "first": squares[first].sum() / squares.sum(),
                "kl": kl.mean(),
                "kl_rest": kl.sort().values[: len(kl) - len(kl) // 100].mean(),
            }
            study.result[f"{name}, {text}"] = numbers = {key: float(value) for key, value in numbers.items()}
            cells = " | ".join(f"{value:.4f}" for value in numbers.values())
            print(f"| {name} | {text} | {cells} |", flush=True)


@torch.no_grad()
def inputs_of(loaded, name, windows):
    """Return what a layer reads on all windows, one row a token."""
    seen = []
    layer = loaded.model.get_submodule(name)
    hook = layer.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].flatten(0, 1).clone()))
    for chunk in windows.batches(8):
        loaded.model(input_ids=windows.ids[chunk], use_cache=False, logits_to_keep=1)
    hook.remove()
    return torch.cat(seen)


def forms(study):
    """Solve the matrices of one run by every form at several strengths."""
    study.quantise("study_capture", form=study.options.form)
    problems = [problem for problem in PROBLEMS.values() if bool(problem.fit.C.any())]
    sets = {f"gptaq, columns {order}": ("gptaq", "auto", order) for order in ("diagonal", "natural")}
    sets |= {f"shift, scales of {grid}": ("shift", grid, "diagonal") for grid in ("original", "shifted")}
    print(
        "| form | strength | held-out error | moved weights | weights on the first half | on the last | codes at an end |"
    )
    print("|---|---|---|---|---|---|---|")
    strengths = (0.0, 0.25, 0.5, 0.75, 1.0)
    for name, (form, grid, order) in sets.items():
        seen = {strength: [] for strength in strengths}
        for problem in problems:
            keys = {"form": form, "grid": grid, "damping": 0.01, "order": order, "qparams": problem.qparams}
            solver = StrengthSolver(problem.weight, problem.spec, problem.fit, **keys)
            meter = StrengthMeter(problem.weight, solver.direction(), problem.held_out)
            for strength, qtensor in zip(strengths, solver.solve(strengths), strict=True):
                seen[strength].append(describe(problem, meter, qtensor, solver.factor.order))
        for strength, rows in seen.items():
            means = [statistics.fmean(column) for column in zip(*rows, strict=True)]
            study.result[f"{name}, {strength}"] = means
            print(f"| {name} | {strength} | " + " | ".join(f"{mean:.4f}" for mean in means) + " |", flush=True)


def describe(problem, meter, qtensor, order):
    """Return held-out error, relative squared change of weights (all, early, late columns), share of codes at an end."""
    Q, W = qtensor.dequantize(torch.float64), problem.weight.double()
    moved, size = ((Q - W) ** 2).sum(0)[order], (W**2).sum(0)[order]
    half = len(order) // 2
    grid = problem.spec.grid
    ends = ((qtensor.codes == grid.min_code) | (qtensor.codes == grid.max_code)).double().mean()
    shares = [
        float(m.sum() / s.sum()) for m, s in ((moved, size), (moved[:half], size[:half]), (moved[half:], size[half:]))
    ]
    return [meter.measure(Q).error, *shares, float(ends)]


class replaced:  # noqa: N801 - reads as a verb where it is used
    """While active, a layer computes with another weight."""

    def __init__(self, layer, weight):
        self.layer, self.weight = layer, weight

    def __enter__(self):
        self.layer.forward = lambda inputs: torch.nn.functional.linear(inputs, self.weight, self.layer.bias)

    def __exit__(self, *_):
        del self.layer.forward


def rank_correlation(one, other):
    """Return Spearman's rank correlation."""
    from scipy.stats import spearmanr

    return float(spearmanr(one, other).statistic)


def site_names(study):
    """Return the names of all sites behind the first block's first group, in order, from a run that costs nothing."""
    report = study.quantise("rtn")
    return [site.name for block in report.blocks for site in block.sites][3:]


PARTS = {"loops": loops, "gains": gains, "swap": swap, "aim": aim, "forms": forms, "tokens": tokens, "ends": ends}


def main():
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("part", choices=tuple(PARTS))
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", default="books-7m")
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group-size", type=int, required=True)
    parser.add_argument("--form", default="shift")
    parser.add_argument("--draw", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--windows", type=int, default=40)
    places = ["3.mlp.down_proj", "4.mlp.down_proj", "3.self_attn.k_proj", "4.self_attn.q_proj", "2.mlp.gate_proj"]
    parser.add_argument("--sites", nargs="+", default=places, help="for tokens: matrices, without model.layers.")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    study = Study(options)
    PARTS[options.part](study)
    study.finish()


if __name__ == "__main__":
    main()
