"""Image classifiers: bases side by side on the same pictures and grids, paired over calibration draws.

    python benchmarks/bench_vision.py --output out/vision --models vit-cifar10 resnet20 resnet32 --draws 3

A draw is a seed: other calibration pictures, another split. All methods of a draw see the same pictures. Writes one JSON line
a run as it goes (and goes on where it stopped), then table.md; with `--draws 0` only the table. Needs BITMEND_ASSETS; the
residual networks are converted first (`make_cifar_resnet.py`).

`--part train-50000 --count 3000` scores on pictures that the networks were trained on: for choices between settings, which
must not be made on test-3000.
"""

import argparse
import json
import shutil
import statistics
import time
from functools import cache
from pathlib import Path

import torch
from scipy import stats

import bitmend
from bitmend import assets
from bitmend.calibrate.images import labelled
from bitmend.evaluate.images import labels_of, run_on_pictures, score_pictures
from bitmend.evaluate.load import load_model
from bitmend.models.cifar_resnet import convert
from bitmend.protocols import SilentProgress

BATCH = 250
NETWORKS = ("resnet20", "resnet32")
PRECISIONS = {"8/8": (8, 8), "6/6": (6, 6), "4/4": (4, 4), "3/3": (3, 3), "2/4": (2, 4)}


def static(observer, *, attention=True, grid=None, gelu=None):
    """Return the keys of static ranges with zero points for inputs and, in transformers, what attention multiplies."""

    def keys(bits):
        found = {
            "activations.bits": bits,
            "activations.static": True,
            "activations.symmetric": False,
            "activations.observer": observer,
        }
        if gelu:
            found["activations.after_gelu"] = gelu
        if attention:
            found |= {f"attention.{name}_bits": bits for name in ("query", "key", "value", "probability")}
            found |= {"attention.static": True, "attention.observer": observer}
            if grid:
                found["attention.probability_grid"] = grid
        return found

    return keys


FOLD = [{"name": "fold_batch_norm", "force": True}]  # with one scale a channel the guard sees no difference
REPQ = [{"name": "repq"}]
# name: solver, its keys, transforms, activation keys, observer of the weights
VIT = {
    "minmax": ("rtn", {}, [], static("minmax"), "minmax"),
    "percentile": ("rtn", {}, [], static("percentile"), "percentile"),
    "omse": ("rtn", {}, [], static("mse"), "mse"),
    "twin grids": ("rtn", {}, [], static("percentile", grid="twin", gelu="twin"), "mse"),
    "log sqrt2": ("rtn", {}, [], static("percentile", grid="log_sqrt2"), "mse"),
    "repq": ("rtn", {}, REPQ, static("percentile", grid="log_sqrt2"), "percentile"),
    "repq, mse": ("rtn", {}, REPQ, static("percentile", grid="log_sqrt2"), "mse"),
    "erq": ("erq", {}, REPQ, static("percentile", grid="log_sqrt2"), "mse"),
    "gptq": ("gptq", {}, REPQ, static("percentile", grid="log_sqrt2"), "mse"),
    "rescomp": ("rescomp", {}, REPQ, static("percentile", grid="log_sqrt2"), "mse"),
    "gptaq": ("gptaq", {}, REPQ, static("percentile", grid="log_sqrt2"), "mse"),
    "marr, rescomp form": ("marr", {"solver.form": "rescomp"}, REPQ, static("percentile", grid="log_sqrt2"), "mse"),
    "marr, gptaq form": ("marr", {"solver.form": "gptaq"}, REPQ, static("percentile", grid="log_sqrt2"), "mse"),
    "marr": ("marr", {}, REPQ, static("percentile", grid="log_sqrt2"), "mse"),
    "descent": ("descent", {}, REPQ, static("percentile", grid="log_sqrt2"), "mse"),
}
CNN = {
    "minmax": ("rtn", {}, [], static("minmax", attention=False), "minmax"),
    "percentile": ("rtn", {}, [], static("percentile", attention=False), "percentile"),
    "omse": ("rtn", {}, [], static("mse", attention=False), "mse"),
    "erq": ("erq", {}, [], static("mse", attention=False), "mse"),
    "gptq": ("gptq", {}, [], static("mse", attention=False), "mse"),
    "rescomp": ("rescomp", {}, [], static("mse", attention=False), "mse"),
    "gptaq": ("gptaq", {}, [], static("mse", attention=False), "mse"),
    "marr, rescomp form": ("marr", {"solver.form": "rescomp"}, [], static("mse", attention=False), "mse"),
    "marr, gptaq form": ("marr", {"solver.form": "gptaq"}, [], static("mse", attention=False), "mse"),
    "marr": ("marr", {}, [], static("mse", attention=False), "mse"),
    "descent": ("descent", {}, [], static("mse", attention=False), "mse"),
    "gptq, folded": ("gptq", {}, FOLD, static("mse", attention=False), "mse"),
    "marr, rescomp form, folded": ("marr", {"solver.form": "rescomp"}, FOLD, static("mse", attention=False), "mse"),
    "marr, gptaq form, folded": ("marr", {"solver.form": "gptaq"}, FOLD, static("mse", attention=False), "mse"),
}
BASES = ("gptq",)


def methods_of(model):
    """Return the methods that apply to a model."""
    return CNN if model in NETWORKS else VIT


def model_folder(options, model):
    """Return a model of the assets, a converted residual network, or the folder itself."""
    if model not in NETWORKS:
        return Path(model) if Path(model).is_dir() else assets.path(model)
    folder = options.output / model
    if not folder.is_dir():
        convert(assets.path("resnet-cifar") / f"{model}.safetensors", folder)
    return folder


def archive(name):
    """Return an archive of pictures of the assets."""
    return assets.path("cifar10") / f"{name}.tar.gz"


class Scored:
    """Pictures to score on, decoded once, and the original's answers; what `score_pictures` asks of labelled pictures."""

    def __init__(self, source, path, count):
        original = load_model(source, "cpu", torch.float32)
        pictures = labelled(path, original.processor, labels_of(original))
        self.name, self._sha256 = pictures.name, pictures.sha256(count)
        self._batches = list(pictures.batches(BATCH, count))
        self.reference = torch.cat([run_on_pictures(original, batch) for batch, _ in self._batches])

    def __len__(self):
        return len(self.reference)

    def batches(self, size, count):
        """Return all batches, which were made at the same size."""
        assert size == BATCH
        assert count is None
        return self._batches

    def sha256(self, count):
        """Return the hash of the pictures."""
        del count
        return self._sha256

    def score(self, folder):
        """Return the result of a quantised model."""
        model = load_model(folder, "cpu", torch.float32)
        options = {"batch_size": BATCH, "count": None, "progress": SilentProgress()}
        return score_pictures(model, self, reference=self.reference, **options)


@cache
def scored(source, path, count):
    """Return the pictures to score a model on."""
    return Scored(source, path, count)


def run(options, model, method, precision, draw):
    """Quantise and score, and return one row of results."""
    solver, keys, transforms, rounding, observer = methods_of(model)[method]
    weight_bits, activation_bits = PRECISIONS[precision]
    overrides = {
        "weights.bits": weight_bits,
        "weights.observer": observer,
        "calibration.sequences": options.pictures,
        "calibration.seed": draw,
        "transforms": transforms,
        **rounding(activation_bits),
        **keys,
    }
    recipe = bitmend.load_recipe(solver, overrides)
    source, output = model_folder(options, model), options.output / "model"
    shutil.rmtree(output, ignore_errors=True)
    started = time.perf_counter()
    report = bitmend.quantize(
        source,
        recipe,
        [archive("calibration-1024")],
        output=output,
        overwrite=True,
    )
    seconds = time.perf_counter() - started
    found = scored(source, archive(options.part), options.count).score(output)
    sites = [site for block in report.blocks for site in block.sites]
    weights = sum(path.stat().st_size for path in output.glob("*.safetensors"))
    shutil.rmtree(output, ignore_errors=True)
    return {
        "model": model,
        "method": method,
        "precision": precision,
        "draw": draw,
        "part": options.part,
        "pictures": options.pictures,
        "calibration_sha256": report.calibration["sha256"],
        "pictures_sha256": found.pictures_sha256,
        "top1": found.top1,
        "top1_low": found.top1_low,
        "top1_high": found.top1_high,
        "reference_top1": found.reference_top1,
        "kl": found.kl,
        "agreement": found.top1_agreement,
        "count": found.count,
        "bits": report.bits,
        "file_bytes": weights,
        "block_error": report.blocks[-1].relative_error,
        "dropped": sum(not site.accepted for site in sites),
        "events": len(report.events),
        "seconds": seconds,
        "solver_seconds": report.seconds.get("solve", 0.0),
        "peak_memory_bytes": report.peak_memory_bytes,
        "versions": report.versions,
    }


def interval(differences):
    """Return mean and half width of the 95 % interval by Student's t; no width for one difference."""
    mean = statistics.mean(differences)
    if len(differences) < 2:
        return mean, float("nan")
    spread = statistics.stdev(differences) / len(differences) ** 0.5
    return mean, float(stats.t.ppf(0.975, len(differences) - 1)) * spread


def table(results, bases=BASES):
    """Return tables in Markdown: for each model and precision all methods, with differences in top-1 to the bases."""
    parts = []
    for model in dict.fromkeys(row["model"] for row in results):
        of_model = [row for row in results if row["model"] == model]
        reference = of_model[0]["reference_top1"]
        head = [
            "W/A",
            "method",
            "draws",
            "top-1 (%)",
            "per draw",
            "interval of draw 0",
            *(f"against {b}" for b in bases),
        ]
        head += ["KL (nats)", "bits, layers", "file (kB)", "seconds"]
        parts += [f"\n**{model}**, full precision {100 * reference:.2f} %\n", "| " + " | ".join(head) + " |"]
        parts.append("|" + "---|" * len(head))
        for precision in PRECISIONS:
            for method in methods_of(model):
                rows = [row for row in of_model if (row["precision"], row["method"]) == (precision, method)]
                if rows:
                    parts.append(line(rows, of_model, precision, method, bases))
    return "\n".join(parts) + "\n"


def line(rows, of_model, precision, method, bases):
    """Return one line of a table."""
    top1 = [100 * row["top1"] for row in rows]
    first = rows[0]
    cells = [precision, method, str(len(rows)), f"{statistics.mean(top1):.2f}", " ".join(f"{one:.1f}" for one in top1)]
    cells.append(f"{100 * first['top1_low']:.1f} to {100 * first['top1_high']:.1f}")
    for base in bases:
        of_base = {r["draw"]: r for r in of_model if (r["precision"], r["method"]) == (precision, base)}
        pairs = [100 * (row["top1"] - of_base[row["draw"]]["top1"]) for row in rows if row["draw"] in of_base]
        if not pairs or base == method:
            cells.append("")
            continue
        mean, width = interval(pairs)
        cells.append(f"{mean:+.2f} ± {width:.2f}" if len(pairs) > 1 else f"{mean:+.2f}")
    cells += [
        f"{statistics.mean(row['kl'] for row in rows):.4f}",
        f"{first['bits']['quantised_layers']:.3f}",
        f"{first['file_bytes'] / 1e3:.0f}",
        f"{statistics.mean(row['seconds'] for row in rows):.1f}",
    ]
    return "| " + " | ".join(cells) + " |"


def main():
    """Run what is missing, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=["vit-cifar10", *NETWORKS])
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS), choices=list(PRECISIONS))
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--pictures", type=int, default=256, help="calibration pictures")
    parser.add_argument("--part", default="test-3000", help="what is scored on")
    parser.add_argument("--count", type=int, help="how many of its pictures; all unless given")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    record = options.output / "results.jsonl"
    results = [json.loads(row) for row in record.read_text().splitlines()] if record.exists() else []
    done = {(row["model"], row["method"], row["precision"], row["draw"]) for row in results}
    for draw in range(options.draws):
        for model in options.models:
            for precision in options.precisions:
                for method in options.methods or methods_of(model):
                    key = (model, method, precision, draw)
                    if key in done or method not in methods_of(model):
                        continue
                    row = run(options, *key)
                    results.append(row)
                    with record.open("a") as file:
                        file.write(json.dumps(row) + "\n")
                    print(
                        f"{model} {precision} {method}, draw {draw}: top-1 {100 * row['top1']:.2f}, {row['seconds']:.0f} s"
                    )
    text = table(results)
    (options.output / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
