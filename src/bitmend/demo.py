"""The main job on the embedded model, from folder to proof, in one command."""

from pathlib import Path

from bitmend import assets
from bitmend.evaluate.evaluate import evaluate
from bitmend.evaluate.generation import generate_text
from bitmend.formats.ledger import ledger
from bitmend.pipeline.run import choose_device, quantize
from bitmend.protocols import Progress
from bitmend.report.terminal import number, print_table

RECIPES = ("rtn", "gptq", "descent")
SEQUENCES, SEQUENCE_LENGTH, WINDOWS = 64, 512, 40
PROMPT = "It was a dark evening, and the old man"


def run_demo(output: Path, *, bits: int, progress: Progress) -> None:
    """Quantise books-7m by round-to-nearest, GPTQ and descent, load each back, measure all, and print one table.

    Calibration text and evaluation text are by different authors; the model was trained on neither of the latter.
    """
    model, fit, unseen = assets.path("books-7m"), assets.path("books-calibration"), assets.path("books-eval")
    folders = []
    for recipe in RECIPES:
        folder = output / f"books-7m-{recipe}-w{bits}"
        progress.say(f"{recipe}: quantising books-7m to {bits} bits into {folder}")
        keys = {
            "weights.bits": bits,
            "calibration.sequences": SEQUENCES,
            "calibration.sequence_length": SEQUENCE_LENGTH,
        }
        quantize(
            model,
            recipe,
            [fit],
            output=folder,
            overrides=keys,
            overwrite=True,
            progress=progress,
        )
        folders.append(folder)
    report = evaluate([model, *folders], texts=[unseen], reference=model, windows=WINDOWS, progress=progress)
    rows = []
    for name, folder, result in zip(("full precision", *RECIPES), (model, *folders), report.models, strict=True):
        account, measured = ledger(folder), result.texts[0]
        layers = "16" if account.bits_per_weight is None else f"{account.bits_per_weight:.3f}"
        row = [name, layers, f"{account.bits_per_weight_model:.3f}", f"{account.file_bytes / 1e6:.2f}"]
        rows.append([*row, number(measured.perplexity, 5), number(measured.kl, 3), number(measured.top1_agreement, 3)])
    title = f"books-7m at {bits} bits, on {WINDOWS} windows of five books it never saw (all of it from the saved files)"
    header = ("recipe", "bits: layers", "bits: model", "MB", "perplexity", "KL (nats)", "top-1 agreement")
    print_table(title, header, rows)
    text = generate_text(folders[-1], PROMPT, tokens=40, temperature=0.0, seed=0, device=choose_device("auto"))
    print_table("", (f"{RECIPES[-1]} at {bits} bits continues a text",), [[text]])
