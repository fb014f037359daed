"""What the command line says at the end of a run, of an evaluation, of a ledger: plain lines and rows of text."""

from collections.abc import Iterator

from bitmend.evaluate.results import EvaluationReport
from bitmend.formats.ledger import CATEGORIES, QUANTISED, Ledger
from bitmend.protocols import RunReport, SiteReport
from bitmend.report.terminal import number

MOST_EVENTS = 8


def run_lines(report: RunReport) -> Iterator[str]:
    """Yield the summary of a run: events first, then what was proved, the bits, the time."""
    yield from _event_lines(report)
    sites = [site for block in report.blocks for site in block.sites]
    proved = [site for site in sites if site.held_out_error is not None]
    if proved:
        yield _proof_line(proved)
    yield from _compensation_lines(report)
    bits = report.bits
    where = (
        f"{len(sites)} matrices quantised; {{}} bits per weight in them" if sites else "{} bits per quantised weight"
    )
    yield (
        f"{where.format(format(bits['quantised_layers'], '.3f'))}, "
        f"{bits['whole_model']:.3f} in the whole model (from the saved bytes)"
    )
    yield f"wrote {report.output} in {report.seconds['total']:.1f} s, peak memory {report.peak_memory_bytes / 1e6:.0f} MB"


def _event_lines(report: RunReport) -> Iterator[str]:
    for event in report.events[:MOST_EVENTS]:
        yield f"{event.kind} at {event.where}: {event.message}"
    if len(report.events) > MOST_EVENTS:
        yield f"... and {len(report.events) - MOST_EVENTS} more events in run.json"


def _compensation_lines(report: RunReport) -> Iterator[str]:
    """Yield what the maps beside blocks are worth, by the rows that they were not fitted to."""
    fitted = [block.compensation for block in report.blocks if "structure" in block.compensation]
    if not fitted:
        return
    kept = [one for one in fitted if one["kept"]]
    stored = sum(one["bytes"] for one in kept)
    yield f"maps beside blocks: {len(kept)} of {len(fitted)} kept, {stored / 1e6:.3g} MB"
    for judged in (block.compensation["model"] for block in report.blocks if "model" in block.compensation):
        yield (
            f"held-out distance of the model's output from full precision: {number(judged['with'])} with them against "
            f"{number(judged['without'])} without"
        )


def _proof_line(proved: list[SiteReport]) -> str:
    base = sum(site.base_held_out_error or 0.0 for site in proved) / len(proved)
    ours = sum(min(site.held_out_error or 0.0, site.base_held_out_error or 0.0) for site in proved) / len(proved)
    kept = sum(site.accepted for site in proved)
    both = proved[0].streams == 2
    against = "of a layer against the full-precision network" if both else "that rounding adds to a layer's output"
    change = f"{(ours / base - 1) * 100:+.1f} %" if base else "no change"
    # A method that chose a strength by these very errors has made them a little too good.
    used = "; strengths were chosen on the same rows" if any(site.chosen_on_held_out for site in proved) else ""
    return (
        f"held-out error {against}, mean over {len(proved)} matrices: {number(ours)} against {number(base)} for "
        f"round-to-nearest at the same bits ({change}); {kept} of {len(proved)} candidates kept{used}"
    )


def evaluation_rows(report: EvaluationReport) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of an evaluation, one row for each model and text, or set of pictures."""
    if any(model.images for model in report.models):
        return _picture_rows(report)
    if any(model.embeddings for model in report.models):
        return _embedding_rows(report)
    header = ["model", "text", "windows", "perplexity"]
    compared = report.reference is not None
    if compared:
        header += ["KL (nats)", "+-", "top-1 agreement"]
    rows = []
    for text in report.models[0].texts if compared and report.models else ():
        scored = f"{text.windows} x {text.window_length}"
        name = text.file.replace("\\", "/").rsplit("/", 1)[-1]
        rows.append(
            [f"{report.reference} (reference)", name, scored, number(text.reference_perplexity, 6), "0", "-", "1"]
        )
    for model in report.models:
        for text in model.texts:
            name = text.file.replace("\\", "/").rsplit("/", 1)[-1]
            row = [model.model, name, f"{text.windows} x {text.window_length}", number(text.perplexity, 6)]
            if compared:
                row += [number(text.kl), number(text.kl_standard_error, 2), number(text.top1_agreement)]
            rows.append(row)
    return header, rows


def _picture_rows(report: EvaluationReport) -> tuple[list[str], list[list[str]]]:
    header = ["model", "pictures", "count", "top-1 (%)", "95 % interval", "top-5 (%)"]
    compared = report.reference is not None
    rows = []
    if compared:
        header += ["KL (nats)", "+-", "top-1 agreement"]
        for images in report.models[0].images:
            name = _last_part(images.path)
            row = [f"{report.reference} (reference)", name, str(images.count), _percent(images.reference_top1), "", ""]
            rows.append([*row, "0", "-", "1"])
    for model in report.models:
        for images in model.images:
            row = [model.model, _last_part(images.path), str(images.count), _percent(images.top1)]
            between = "" if images.top1 is None else f"{_percent(images.top1_low)} to {_percent(images.top1_high)}"
            row += [between, _percent(images.top5)]
            if compared:
                row += [number(images.kl), number(images.kl_standard_error, 2), number(images.top1_agreement)]
            rows.append(row)
    return header, rows


def _embedding_rows(report: EvaluationReport) -> tuple[list[str], list[list[str]]]:
    header = ["model", "source", "embeddings", "cosine with reference", "1 % below", "rank correlation", "with scores"]
    rows = []
    for embedded in report.models[0].embeddings if report.reference is not None else ():
        row = [f"{report.reference} (reference)", _last_part(embedded.path), str(embedded.count), "1", "1", "1"]
        rows.append([*row, number(embedded.reference_score_correlation)])
    for model in report.models:
        for embedded in model.embeddings:
            row = [model.model, _last_part(embedded.path), str(embedded.count)]
            values = (
                embedded.similarity,
                embedded.similarity_low,
                embedded.rank_correlation,
                embedded.score_correlation,
            )
            rows.append(row + [number(value) for value in values])
    return header, rows


def _last_part(path: str) -> str:
    return path.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f}"


def ledger_rows(account: Ledger) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of a ledger: bytes of each category, then the totals, which count rotations in config.json."""
    rows = [
        [name, f"{account.bits[name] / 8:,.0f}", f"{account.bits[name] / 8 / account.file_bytes:.1%}"]
        for name in CATEGORIES
        if account.bits.get(name)
    ]
    rows.append(["file", f"{account.file_bytes:,}", "100.0%"])
    if account.rotation_bytes:
        rows.append(["rotations in config.json", f"{account.rotation_bytes:,}", "beside it"])
    if account.bits_per_weight is not None:
        rows.append(["bits per weight, quantised layers", f"{account.bits_per_weight:.4f}", ""])
    rows.append(["bits per weight, whole model", f"{account.bits_per_weight_model:.4f}", ""])
    return ["where the bytes are", "bytes", "share"], rows


def online_rows(account: Ledger) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of what is done to activations while the model runs."""
    return ["while the model runs", "modules"], [[what, str(count)] for what, count in account.online.items()]


def scheme_rows(account: Ledger) -> tuple[list[str], list[list[str]]]:
    """Return header and rows that group the quantised modules by width of code."""
    widths = sorted({row.code_bits for row in account.rows if row.code_bits is not None})
    rows = []
    for width in widths:
        members = [row for row in account.rows if row.code_bits == width]
        weights = sum(row.weights for row in members)
        stored = sum(row.bits.get(category, 0) for row in members for category in QUANTISED)
        rows.append([f"{width} bits", str(len(members)), f"{weights:,}", f"{stored / weights:.4f}"])
    return ["codes", "matrices", "weights", "true bits per weight"], rows
