"""Residual correction methods side by side: same rows, same grid, paired over calibration draws.

    python benchmarks/bench_marr.py --output out/marr --model books-7m --bits 3 --group-size -1 --draws 8 \\
        --texts books-eval wikitext2-test

A draw is a seed: other calibration rows, another split. All methods of a draw see the same rows. Reported against the
methods that `--bases` names: the mean over draws of the difference in KL, with its 95 % interval by Student's t. Writes one
JSON line a run as it goes (and goes on where it stopped), then table.md; with `--draws 0` only the table.
"""

import argparse
import json
import shutil
import statistics
import time
from pathlib import Path

from scipy import stats

import bitmend
from bitmend import assets
from bitmend.report.terminal import TerminalProgress

CAUSAL = {"solver.form": "gptaq"}
IN_SAMPLE = {"solver.feedback": "in_sample", "solver.selection": "last", "solver.start": "global"}
METHODS = {
    "rtn": ("rtn", {}),
    "gptq": ("gptq", {}),
    "gptaq 0.25": ("gptaq", {}),
    "gptaq 0.5": ("gptaq", {"solver.residual_strength": 0.5}),
    "gptaq 0.75": ("gptaq", {"solver.residual_strength": 0.75}),
    "gptaq 1.0": ("gptaq", {"solver.residual_strength": 1.0}),
    "grid, gptaq form": ("strength_grid", CAUSAL),
    "pid held-out, gptaq form": ("marr", CAUSAL),
    "pid in-sample, gptaq form": ("marr", CAUSAL | IN_SAMPLE),
    "rescomp": ("rescomp", {}),
    "marr, rescomp form": ("marr", {"solver.form": "rescomp"}),
    "qep 0.5": ("qep", {}),
    "qep 0.75": ("qep", {"solver.residual_strength": 0.75}),
    "qep 1.0": ("qep", {"solver.residual_strength": 1.0}),
    "coreq": ("coreq", {}),
    "grid, shift": ("strength_grid", {}),
    "marr": ("marr", {}),
    "pid in-sample, shift": ("marr", IN_SAMPLE),
    "marr, grid of W": ("marr", {"solver.grid": "original"}),
    "closed form, shift": ("marr", {"solver.max_steps": 0, "solver.selection": "last"}),
    "descent": ("descent", {}),
    "descent, strength 0": ("descent", {"solver.residual_strength": 0.0}),
    "descent 0.25": ("descent", {"solver.residual_strength": 0.25}),
    "descent 0.5": ("descent", {"solver.residual_strength": 0.5}),
    "descent 0.75": ("descent", {"solver.residual_strength": 0.75}),
    "descent, no factors": ("descent", {"solver.scale_factors": [1.0]}),
    "descent, no sweeps": ("descent", {"solver.sweeps": 0, "solver.rounds": 0}),
    "descent, no refit": ("descent", {"solver.rounds": 0}),
}
BASES = ("gptq", "gptaq 0.25")


def model_folder(name):
    """Return a model of the assets, or the folder itself."""
    return Path(name) if Path(name).is_dir() else assets.path(name)


def run(options, method, draw):
    """Quantise and score one method on one draw."""
    recipe, extra = METHODS[method]
    keys = {"weights.bits": options.bits, "weights.group_size": options.group_size, "calibration.seed": draw}
    keys |= {"calibration.sequences": options.sequences, "calibration.sequence_length": options.length}
    keys |= {"calibration.held_out": options.held_out, "calibration.two_streams": True, **extra}
    if options.residual is not None:
        keys["calibration.residual"] = options.residual
    keys["transforms"] = [json.loads(one) if one.startswith("{") else {"name": one} for one in options.transforms]
    if options.activation_bits is not None:
        keys |= {"activations.bits": options.activation_bits, "activations.clip_ratio": options.clip_ratio}
    if options.kv_bits is not None:
        keys |= {"kv_cache.bits": options.kv_bits, "kv_cache.clip_ratio": options.kv_clip_ratio}
        keys |= {"kv_cache.rotate": not options.kv_plain}
    folder = options.output / "model"
    started = time.perf_counter()
    rows = [assets.path("books-calibration")]
    model = model_folder(options.model)
    report = bitmend.quantize(model, recipe, rows, output=folder, overrides=keys, overwrite=True)
    seconds = time.perf_counter() - started
    scores = bitmend.evaluate(
        [folder],
        texts=[assets.path(text) for text in options.texts],
        reference=model,
        windows=options.windows,
    ).models[0]
    sites = [site for block in report.blocks for site in block.sites]
    held_out = [site.held_out_error for site in sites if site.held_out_error is not None]
    result = {
        "method": method,
        "draw": draw,
        "bits_per_weight": report.bits["quantised_layers"],
        "held_out_error": statistics.fmean(held_out) if held_out else None,
        "block_error": report.blocks[-1].relative_error,
        "strengths": [site.diagnostics.get("residual_strength") for site in sites],
        "passes": sum(site.diagnostics.get("passes", 0) for site in sites),
        "solver_seconds": sum(site.seconds for site in sites),
        "seconds": seconds,
    }
    for name, text in zip(options.texts, scores.texts, strict=True):
        result[f"kl {name}"] = text.kl
        result[f"ppl {name}"] = text.perplexity
    shutil.rmtree(folder)
    return result


def interval(differences):
    """Return mean and half width of the 95 % interval of the mean."""
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return mean, float("nan")
    return mean, stats.t.ppf(0.975, len(differences) - 1) * statistics.stdev(differences) / len(differences) ** 0.5


def table(results, texts, bases=BASES):
    """Return the Markdown table, best KL on the first text first."""
    by = {}
    for result in results:
        by.setdefault(result["method"], {})[result["draw"]] = result
    header = ["method", "draws", "held-out error"]
    for text in texts:
        header += [f"KL {text}", *(f"against {base}" for base in bases), "perplexity"]
    header += ["mean strength", "passes", "solver s"]
    out = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    order = sorted(by, key=lambda name: statistics.fmean(r[f"kl {texts[0]}"] for r in by[name].values()))
    for name in order:
        draws = by[name]
        errors = [r["held_out_error"] for r in draws.values() if r["held_out_error"] is not None]
        row = [name, str(len(draws)), f"{statistics.fmean(errors):.5f}" if errors else "-"]
        for text in texts:
            row.append(f"{statistics.fmean(r[f'kl {text}'] for r in draws.values()):.5f}")
            for base in bases:
                pairs = [draws[d][f"kl {text}"] / by[base][d][f"kl {text}"] - 1 for d in draws if d in by.get(base, {})]
                if name == base or not pairs:
                    row.append("-")
                else:
                    mean, half = interval(pairs)
                    row.append(f"{mean:+.1%}" + (f" ± {half:.1%}" if len(pairs) > 1 else ""))
            row.append(f"{statistics.fmean(r[f'ppl {text}'] for r in draws.values()):.3f}")
        strengths = [s for r in draws.values() for s in r["strengths"] if s is not None]
        row.append(f"{statistics.fmean(strengths):.2f}" if strengths else "-")
        row.append(f"{statistics.fmean(r['passes'] for r in draws.values()):.0f}")
        row.append(f"{statistics.fmean(r['solver_seconds'] for r in draws.values()):.1f}")
        out.append("| " + " | ".join(row) + " |")
    return (
        "\n".join(out)
        + "\n\nEach difference is over the draws that both have; ± is the half width of its 95 % interval.\n"
    )


def main():
    """Run what is missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", default="books-7m")
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group-size", type=int, required=True)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--first-draw", type=int, default=0)
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--held-out", type=float, default=0.25)
    parser.add_argument("--transforms", nargs="*", default=[], help="names, or JSON tables with a name and other keys")
    parser.add_argument("--activation-bits", type=int)
    parser.add_argument("--clip-ratio", type=float, default=0.9)
    parser.add_argument("--kv-bits", type=int)
    parser.add_argument("--kv-clip-ratio", type=float, default=1.0)
    parser.add_argument("--kv-plain", action="store_true", help="without rotating queries and keys")
    parser.add_argument("--residual", choices=["whole", "inherited"], help="what counts as the residual")
    parser.add_argument("--windows", type=int, default=160)
    parser.add_argument("--texts", nargs="+", default=["books-validation"])
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--bases", nargs="*", default=list(BASES), choices=list(METHODS), metavar="METHOD")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    lines = options.output / "results.jsonl"
    results = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    done = {(result["method"], result["draw"]) for result in results}
    draws = range(options.first_draw, options.first_draw + options.draws)
    todo = [(method, draw) for draw in draws for method in options.methods if (method, draw) not in done]
    for method, draw in TerminalProgress().track(todo, "runs", len(todo)):
        result = run(options, method, draw)
        results.append(result)
        with lines.open("a") as file:
            file.write(json.dumps(result) + "\n")
    text = table(results, options.texts, options.bases)
    (options.output / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
