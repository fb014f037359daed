"""Maps beside blocks (QwT) over several bases, side by side on the same rows, paired over calibration draws.

    python benchmarks/bench_qwt.py --output out/qwt/vit --models vit-cifar10 --precisions 4/4 3/3 --bases minmax repq gptq
    python benchmarks/bench_qwt.py --output out/qwt/lm --models books-7m --precisions W3 W2 --bases rtn gptq marr

A draw is a seed: other calibration rows, another split; all runs of a draw see the same rows. Writes one JSON line a run as
it goes (and goes on where it stopped), then table.md; with `--draws 0` only the table. Needs BITMEND_ASSETS.

`--choose` scores on what models may be tuned on (train-50000, books-validation) in place of test-3000 and books-eval.
`--more NAME=KEYS` adds a row of any recipe keys, for comparisons at the same bytes: `--more "g64=weights.group_size:64"`.
"""

import argparse
import json
import shutil
import statistics
import time
from pathlib import Path

import bench_vision as vision

import bitmend
from bitmend import assets

LANGUAGE = {"W4": 4, "W3": 3, "W2": 2}
LANGUAGE_BASES = ("rtn", "gptq", "gptaq", "marr", "descent")
PAPER = {"structure": "full", "target": "local", "solve": "float32_inverse", "gate": "in_sample", "scale_free": False}
COMPENSATIONS = {
    "base": None,
    "bias": {"structure": "bias"},
    "scale and shift": {"structure": "affine"},
    "rank d/16": {"structure": "low_rank"},
    "full": {"structure": "full"},
    "full, local": {"structure": "full", "target": "local"},
    "bias, local": {"structure": "bias", "target": "local"},
    "full, mix": {"structure": "full", "target": "mix"},
    "full, with size": {"structure": "full", "scale_free": False},
    "bias, with size": {"structure": "bias", "scale_free": False},
    "paper": PAPER,
    "auto": {},
}
WINDOWS, SEQUENCE_LENGTH = 40, 512


def keys_of(options, model, base, precision):
    """Return the solver and the recipe keys of a base."""
    if precision in LANGUAGE:
        keys = {"weights.bits": LANGUAGE[precision], "weights.group_size": options.group_size}
        rows = {"calibration.sequences": options.sequences, "calibration.sequence_length": SEQUENCE_LENGTH}
        return base, keys | rows
    solver, keys, transforms, rounding, observer = vision.methods_of(model)[base]
    weight_bits, activation_bits = vision.PRECISIONS[precision]
    found = {"weights.bits": weight_bits, "weights.observer": observer, "transforms": transforms}
    return solver, {**found, "calibration.sequences": options.pictures, **rounding(activation_bits), **keys}


def text(name):
    """Return a text of the assets."""
    return assets.path("text") / f"{name}.txt"


def score(options, language, source, output):
    """Return top-1, or perplexities of a language model, and KL, and on what."""
    if not language:
        part, count = ("train-50000", 3000) if options.choose else ("test-3000", None)
        found = vision.scored(source, vision.archive(part), count).score(output)
        return {"part": part, "top1": found.top1, "reference_top1": found.reference_top1, "kl": found.kl}
    names = ["books-validation"] if options.choose else ["books-eval", "wikitext2-test"]
    report = bitmend.evaluate([output], reference=source, texts=[text(name) for name in names], windows=WINDOWS)
    first, *rest = report.models[0].texts
    found = {"part": names[0], "perplexity": first.perplexity, "kl": first.kl}
    return found | {f"kl_{name}": one.kl for name, one in zip(names[1:], rest, strict=True)}


def run(options, model, base, precision, name, draw):
    """Quantise and score, and return one row of results."""
    solver, keys = keys_of(options, model, base, precision)
    compensation = COMPENSATIONS.get(name)
    keys["calibration.seed"] = draw
    if name in options.rows:
        keys |= options.rows[name]
    elif compensation is not None:
        keys["compensators"] = [{"name": "qwt", **compensation}]
    language = precision in LANGUAGE
    source = assets.path(model) if language else vision.model_folder(options, model)
    rows = [text("books-calibration")] if language else [vision.archive("calibration-1024")]
    output = options.output / "model"
    shutil.rmtree(output, ignore_errors=True)
    started = time.perf_counter()
    report = bitmend.quantize(source, bitmend.load_recipe(solver, keys), rows, output=output, overwrite=True)
    seconds = time.perf_counter() - started
    found = score(options, language, source, output)
    blocks = [block.compensation for block in report.blocks if "structure" in block.compensation]
    weights = sum(path.stat().st_size for path in output.glob("*.safetensors"))
    shutil.rmtree(output, ignore_errors=True)
    return {
        "model": model,
        "base": base,
        "precision": precision,
        "compensation": name,
        "draw": draw,
        "calibration_sha256": report.calibration["sha256"],
        **found,
        "bits": report.bits,
        "file_bytes": weights,
        "block_error": report.blocks[-1].relative_error,
        "removed": [one["removed_held_out"] for one in blocks],
        "r2_held_out": [one["held_out_r2"] for one in blocks],
        "r2_in_sample": [one["in_sample_r2"] for one in blocks],
        "structures": [one["structure"] + (f" {one['rank']}" if one["rank"] else "") for one in blocks],
        "ridges": [one["ridge"] for one in blocks],
        "kept": [one["kept"] for one in blocks],
        "model_judged": report.blocks[-1].compensation.get("model", {}),
        "seconds": seconds,
        "fit_seconds": report.seconds.get("compensate", 0.0),
        "peak_memory_bytes": report.peak_memory_bytes,
        "versions": report.versions,
    }


def change(rows, bases, key):
    """Return the mean paired difference to the base, and its half width, in words."""
    pairs = [row[key] - bases[row["draw"]][key] for row in rows if row["draw"] in bases]
    if not pairs:
        return ""
    factor, digits = (100, 2) if key == "top1" else (1, 4)
    mean, width = vision.interval([factor * pair for pair in pairs])
    return f"{mean:+.{digits}f} ± {width:.{digits}f}" if len(pairs) > 1 else f"{mean:+.{digits}f}"


def table(results):
    """Return tables in Markdown, one for each model."""
    parts = []
    for model in dict.fromkeys(row["model"] for row in results):
        of_model = [row for row in results if row["model"] == model]
        pictures = "top1" in of_model[0]
        key, measure = ("top1", "top-1 (%)") if pictures else ("kl", "KL (nats)")
        reference = f", full precision {100 * of_model[0]['reference_top1']:.2f} %" if pictures else ""
        head = ["base", "beside the blocks", "draws", measure, "against base"]
        head += ["KL (nats)"] if pictures else ["KL, wikitext2"]
        head += ["removed held out, by block", "kept", "bits, layers", "file (kB)", "fit (s)"]
        parts += [f"\n**{model}**{reference}\n", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
        for precision, base, name in dict.fromkeys((r["precision"], r["base"], r["compensation"]) for r in of_model):
            rows = [r for r in of_model if (r["precision"], r["base"], r["compensation"]) == (precision, base, name)]
            bases = {
                r["draw"]: r
                for r in of_model
                if (r["precision"], r["base"], r["compensation"]) == (precision, base, "base")
            }
            parts.append(line(rows, bases, key, f"{precision} {base}", name))
    return "\n".join(parts) + "\n"


def line(rows, bases, key, base, name):
    """Return one line of a table."""

    def mean(of):
        values = [row[of] for row in rows if of in row]
        return statistics.mean(values) if values else float("nan")

    first = rows[0]
    removed = " ".join(f"{100 * one:.0f}" for one in first["removed"] if one is not None)
    kept = f"{sum(first['kept'])}/{len(first['kept'])}" if first["kept"] else ""
    if first["model_judged"].get("kept") == 0:
        kept += ", none in the end"
    value = f"{100 * mean(key):.2f}" if key == "top1" else f"{mean(key):.4f}"
    aside = mean("kl" if key == "top1" else "kl_wikitext2-test")
    other = "" if aside != aside else f"{aside:.4f}"
    cells = [
        base,
        name,
        str(len(rows)),
        value,
        "" if name == "base" else change(rows, bases, key),
        other,
        removed,
        kept,
    ]
    cells += [f"{statistics.mean(r['bits']['quantised_layers'] for r in rows):.3f}", f"{mean('file_bytes') / 1e3:.0f}"]
    cells.append("" if name == "base" else f"{mean('fit_seconds'):.1f}")
    return "| " + " | ".join(cells) + " |"


def parse_more(more):
    """Return the rows of `--more`: name -> recipe keys."""
    found = {}
    for one in more:
        name, _, keys = one.partition("=")
        pairs = [pair.partition(":")[::2] for pair in keys.split(";")]
        found[name] = {key: json.loads(value) for key, value in pairs}
    return found


def main():
    """Run what is missing, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--models", nargs="+", required=True)
    parser.add_argument("--precisions", nargs="+", required=True, choices=[*vision.PRECISIONS, *LANGUAGE])
    parser.add_argument("--bases", nargs="+", required=True)
    parser.add_argument("--compensations", nargs="+", default=list(COMPENSATIONS), choices=list(COMPENSATIONS))
    parser.add_argument("--more", nargs="+", default=[])
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--pictures", type=int, default=128)
    parser.add_argument("--sequences", type=int, default=96)
    parser.add_argument("--group-size", type=int, default=-1)
    parser.add_argument("--choose", action="store_true")
    options = parser.parse_args()
    options.rows = parse_more(options.more)
    options.output.mkdir(parents=True, exist_ok=True)
    record = options.output / "results.jsonl"
    results = [json.loads(row) for row in record.read_text().splitlines()] if record.exists() else []
    identity = ("model", "base", "precision", "compensation", "draw")
    done = {tuple(row[key] for key in identity) for row in results}
    wanted = [
        (model, base, precision, name, draw)
        for draw in range(options.draws)
        for model in options.models
        for precision in options.precisions
        for base in options.bases
        for name in [*options.compensations, *options.rows]
    ]
    for key in wanted:
        if key in done:
            continue
        row = run(options, *key)
        results.append(row)
        with record.open("a") as file:
            file.write(json.dumps(row) + "\n")
        value = f"top-1 {100 * row['top1']:.2f}" if "top1" in row else f"perplexity {row['perplexity']:.3f}"
        print(" ".join(map(str, key)), f"{value} KL {row['kl']:.4f} {row['seconds']:.0f} s", flush=True)
    made = table(results)
    (options.output / "table.md").write_text(made)
    print(made)


if __name__ == "__main__":
    main()
