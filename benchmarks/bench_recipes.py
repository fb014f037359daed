"""Shipped recipes as they stand, side by side: quantise, reload, score.

    BITMEND_ASSETS=FOLDER python benchmarks/bench_recipes.py --output out/recipes --models books-7m \\
        --recipes llm-w4a4-duquant llm-w4a8 --sequences 32 --windows 40

A model is one of the assets, or a folder. Writes one JSON line a run as it goes (and goes on where it stopped), then
table.md.
"""

import argparse
import json
import shutil
import time
from pathlib import Path

import bitmend
from bitmend import assets
from bitmend.pipeline.recipe import load_recipe
from bitmend.report.terminal import TerminalProgress


def cache_bits(recipe):
    """Return the bits of keys and values; 16 where they are not rounded."""
    section = load_recipe(recipe).kv_cache
    return 16 if section is None else section.bits


def run(options, model, recipe, seed):
    """Quantise and score one recipe on one draw of calibration rows."""
    keys = {"calibration.seed": seed, "calibration.sequences": options.sequences}
    keys |= {"calibration.sequence_length": options.length}
    folder = options.output / "model"
    source = Path(model) if Path(model).is_dir() else assets.path(model)
    started = time.perf_counter()
    rows = [assets.path("books-calibration")]
    report = bitmend.quantize(source, recipe, rows, output=folder, overrides=keys, overwrite=True)
    seconds = time.perf_counter() - started
    texts = [assets.path(text) for text in options.texts]
    (scores,) = bitmend.evaluate([folder], texts=texts, reference=source, windows=options.windows).models
    shutil.rmtree(folder)
    result = {
        "model": model,
        "recipe": recipe,
        "seed": seed,
        "bits": report.bits["quantised_layers"],
        "seconds": seconds,
    }
    result |= {"cache bits": cache_bits(recipe), "block error": report.blocks[-1].relative_error}
    result["events"] = sorted({event.kind for event in report.events})
    for name, text in zip(options.texts, scores.texts, strict=True):
        result |= {f"kl {name}": text.kl, f"perplexity {name}": text.perplexity}
    return result


def table(results, texts):
    """Return the Markdown table, means over seeds."""
    header = ["model", "recipe", "seeds", "bits a weight", "cache bits", "block error"]
    header += [f"{what} {text}" for text in texts for what in ("KL", "perplexity")] + ["seconds"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for key in dict.fromkeys((result["model"], result["recipe"]) for result in results):
        rows = [result for result in results if (result["model"], result["recipe"]) == key]

        def mean(name, rows=rows):
            return sum(row[name] for row in rows) / len(rows)

        cells = [*key, len(rows), f"{mean('bits'):.3f}", rows[0]["cache bits"], f"{mean('block error'):.4f}"]
        cells += [f"{mean(f'{what} {text}'):.5g}" for text in texts for what in ("kl", "perplexity")]
        lines.append("| " + " | ".join(map(str, [*cells, f"{mean('seconds'):.0f}"])) + " |")
    return "\n".join(lines) + "\n"


def main():
    """Run what is missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=["books-7m"])
    parser.add_argument("--recipes", nargs="+", required=True)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=160)
    parser.add_argument("--texts", nargs="+", default=["books-validation"])
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    lines = options.output / "results.jsonl"
    results = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    done = {(one["model"], one["recipe"], one["seed"]) for one in results}
    wanted = [(m, r, seed) for seed in range(options.seeds) for m in options.models for r in options.recipes]
    todo = [one for one in wanted if one not in done]
    for one in TerminalProgress().track(todo, "runs", len(todo)):
        results.append(run(options, *one))
        with lines.open("a") as file:
            file.write(json.dumps(results[-1]) + "\n")
    text = table(results, options.texts)
    (options.output / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
