"""Quality of recipes at their true bits: quantise, reload, score. One JSON line a model and text, one Markdown table.

    BITMEND_ASSETS=FOLDER python benchmarks/bench_quality.py --output out/quality --seeds 3

For each embedded model, each width and each recipe: bits from the saved file, perplexity and KL on books-eval (authors that
the model never saw) and wikitext2-test (another domain). Recipes that draw calibration rows run once for each seed; a seed
is another draw of rows and another split. Nothing is chosen on these texts.
"""

import argparse
import json
import statistics
from pathlib import Path

import bitmend
from bitmend import assets
from bitmend.report.terminal import TerminalProgress

GROUP_SIZES = {"books-7m": 128, "stories-260k": -1}  # 172, the width of stories-260k's MLP, has no useful divisor
TEXTS = ("books-eval", "wikitext2-test")
SEQUENCES, LENGTH = 128, 512


def quantise(model, recipe, bits, seed, folder):
    """Write one quantised model, unless it is there, and return its row without scores."""
    keys = {"weights.bits": bits, "weights.group_size": GROUP_SIZES[model], "calibration.seed": seed}
    keys |= {"calibration.sequences": SEQUENCES, "calibration.sequence_length": LENGTH}
    rows = [] if recipe == "rtn" else [assets.path("books-calibration")]
    if not (folder / "run.json").exists():  # written with the rest of the folder, in one rename
        bitmend.quantize(assets.path(model), recipe, rows, output=folder, overrides=keys)
    report = json.loads((folder / "run.json").read_text())
    account = bitmend.ledger(folder)
    return {
        "model": model,
        "recipe": recipe,
        "bits": bits,
        "group_size": GROUP_SIZES[model],
        "seed": None if recipe == "rtn" else seed,
        "rows": report["calibration"].get("sha256"),
        "bits_per_weight": account.bits_per_weight,
        "bits_per_weight_model": account.bits_per_weight_model,
        "dropped": sum(event["kind"] == "dropped" for event in report["events"]),
    }


def main():
    """Run everything and write results.jsonl and table.md."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--windows", type=int, default=160)
    parser.add_argument("--models", nargs="*", default=list(GROUP_SIZES))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    progress = TerminalProgress()
    results = []
    for model in options.models:
        variants = [("rtn", bits, 0) for bits in (4, 3, 2)]
        variants += [("gptq", bits, seed) for bits in (4, 3, 2) for seed in range(options.seeds)]
        rows, folders = [], []
        for recipe, bits, seed in progress.track(variants, f"quantising {model}", len(variants)):
            folder = options.output / f"{model}-{recipe}-w{bits}-s{seed}"
            rows.append(quantise(model, recipe, bits, seed, folder))
            folders.append(folder)
        report = bitmend.evaluate(
            [assets.path(model), *folders],
            texts=[assets.path(text) for text in TEXTS],
            reference=assets.path(model),
            windows=options.windows,
            window_length=LENGTH,
            progress=progress,
        )
        full = {"model": model, "recipe": "full precision", "bits": 16 if model == "books-7m" else 32, "seed": None}
        for row, scores in zip([full, *rows], report.models, strict=True):
            for name, text in zip(TEXTS, scores.texts, strict=True):
                results.append(
                    {**row, "text": name, "perplexity": text.perplexity, "kl": text.kl, "kl_se": text.kl_standard_error}
                )
    lines = "".join(json.dumps(result) + "\n" for result in results)
    (options.output / "results.jsonl").write_text(lines)
    (options.output / "table.md").write_text(table(results))
    print(table(results))


def table(results):
    """Return one Markdown row for each model, width and recipe; mean and, over seeds, standard deviation."""
    out = [
        "| model | recipe | bits: layers | bits: model | text | perplexity | KL (nats) |",
        "|---|---|---|---|---|---|---|",
    ]
    keys = list(dict.fromkeys((r["model"], r["recipe"], r["bits"], r["text"]) for r in results))
    for key in keys:
        members = [r for r in results if (r["model"], r["recipe"], r["bits"], r["text"]) == key]
        model, recipe, bits, text = key
        layers = members[0].get("bits_per_weight")
        whole = members[0].get("bits_per_weight_model")
        name = recipe if layers is None else f"{recipe} W{bits}"
        bits_text = ("-", "-") if layers is None else (f"{layers:.3f}", f"{whole:.3f}")
        ppl, kl = (spread([r[column] for r in members], digits) for column, digits in (("perplexity", 2), ("kl", 4)))
        out.append(f"| {model} | {name} | {bits_text[0]} | {bits_text[1]} | {text} | {ppl} | {kl} |")
    return "\n".join(out) + "\n"


def spread(values, digits):
    """Return the mean, and the standard deviation over seeds where there are several."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


if __name__ == "__main__":
    main()
