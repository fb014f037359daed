"""Tables of results.jsonl: Markdown, mean and spread, ratios of neighbouring runs."""

import statistics

TEXTS = ("books-eval", "wikitext2-test")
PAIRS = (
    ("bitmend gptq", "gptqmodel gptq"),
    ("bitmend gptq, one fit, no search", "gptqmodel gptq"),
    ("bitmend gptq, one fit, no search, low memory", "gptqmodel gptq"),
    ("bitmend gptaq", "gptqmodel gptaq"),
    ("bitmend gptaq, one fit, no search", "gptqmodel gptaq"),
)
MIB = 2**20


def accuracy_table(results):
    """Return one row for each contestant and width, means over draws, and the reasons of those that have none."""
    found = [result for result in results if result["key"]["part"] == "accuracy"]
    lines = [
        "| contestant | W | draws | bits: layers | bits: model | "
        + " | ".join(f"KL, {text}" for text in TEXTS)
        + " | "
        + " | ".join(f"perplexity, {text}" for text in TEXTS)
        + " | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for bits in sorted({result["key"]["bits"] for result in found}, reverse=True):
        for name in dict.fromkeys(result["key"]["name"] for result in found):
            mine = [r for r in found if r["key"]["bits"] == bits and r["key"]["name"] == name]
            good = [result for result in mine if result["status"] == "ok"]
            if not good:
                reasons = "; ".join(dict.fromkeys(f"{result['status']}: {result['reason']}" for result in mine))
                lines += [f"| {name} | {bits} | - | {reasons} | | | | | | |"] if mine else []
                continue
            cells = [f"{good[0]['bits'][key]:.3f}" for key in ("layers", "model")]
            for column, digits in (("kl", 4), ("perplexity", 2)):
                cells += [spread([r["scores"][text][column] for r in good], digits) for text in TEXTS]
            cells.append(f"{statistics.median(result['seconds']['wall'] for result in good):.0f}")
            lines.append(f"| {name} | {bits} | {len(good)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def timing_table(results, part):
    """Return medians of each contestant, and (for the timing part) ratios of the runs of one round."""
    found = [result for result in results if result["key"]["part"] == part and result["status"] == "ok"]
    settings = list(dict.fromkeys((r["key"]["model"], r["key"]["threads"]) for r in found))
    lines = [
        "| model | threads | contestant | runs | wall (s) | load to save (s) | of it on a processor (s) | quantise (s) "
        "| solver (s) | RSS (MiB) | anonymous (MiB) |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for model, threads in settings:
        for name in dict.fromkeys(result["key"]["name"] for result in found):
            runs = [r for r in found if key_of(r) == (model, threads, name)]
            if runs:
                cells = [span([value(run, what) for run in runs]) for what in COLUMNS]
                lines.append(f"| {model} | {threads} | {name} | {len(runs)} | " + " | ".join(cells) + " |")
    if part == "timing":
        lines += ["", *ratio_lines(found, settings)]
    return "\n".join(lines) + "\n"


COLUMNS = ("wall", "work", "cpu", "quantise", "solver", "rss", "anonymous")


def value(run, what):
    """Return one number of a run: seconds, or MiB."""
    if what == "work":
        return sum(run["seconds"][phase] for phase in ("load", "quantise", "save"))
    if what == "cpu":
        return sum(seconds for phase, seconds in run["cpu"].items() if phase != "imports")
    if what in ("rss", "anonymous"):
        return run["memory"][what] / MIB
    return run["seconds"][what]


def ratio_lines(found, settings):
    """Return ours over theirs, run by run: median (least .. most)."""
    lines = [
        "| model | threads | ours / theirs | rounds | wall | load to save | processor | quantise | solver | RSS "
        "| anonymous |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for model, threads in settings:
        for ours, theirs in PAIRS:
            rounds = {}
            for result in found:
                where = key_of(result)
                if where[:2] == (model, threads) and where[2] in (ours, theirs):
                    rounds.setdefault(result["key"]["repeat"], {})[where[2]] = result
            pairs = [pair for pair in rounds.values() if len(pair) == 2]
            if not pairs:
                continue
            cells = [
                span([value(pair[ours], what) / value(pair[theirs], what) for pair in pairs], 2) for what in COLUMNS
            ]
            lines.append(f"| {model} | {threads} | {ours} / {theirs} | {len(pairs)} | " + " | ".join(cells) + " |")
    return lines


def key_of(result):
    """Return model, threads and name of a run."""
    return tuple(result["key"][part] for part in ("model", "threads", "name"))


def spread(values, digits):
    """Return the mean, and the standard deviation over draws where there are several."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def span(values, digits=1):
    """Return the median, and the least and largest where there are several."""
    middle = f"{statistics.median(values):.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.{digits}f} .. {max(values):.{digits}f})"
