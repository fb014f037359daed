"""What `bitmend plan` says: one table of what a run takes and what is there, and where the memory goes."""

from collections.abc import Iterator

from bitmend.pipeline.plan import Plan, duration, size

SHOWN_TERMS = 6


def plan_rows(plan: Plan) -> tuple[list[str], list[list[str]]]:
    """Return header and rows: memory, disk, output, time."""
    made, limits = plan.forecast, plan.limits
    rows = [["memory, above that of the idle process", size(made.host_bytes), _there(limits.memory)]]
    if plan.facts.on_device:
        rows.append(["device memory", size(made.device_bytes), _there(limits.device)])
    rows.append(["disk, while it runs", size(made.partial_bytes), _there(limits.disk)])
    rows.append(["disk, when it is done", size(made.output_bytes), ""])
    rows += [
        [f"time, {phase}" if phase != "total" else "time", duration(seconds), ""]
        for phase, seconds in made.seconds.items()
        if seconds >= 1 or phase == "total"
    ]
    return ["forecast", "needed", "available"], rows


def plan_lines(plan: Plan) -> Iterator[str]:
    """Yield what the table does not say: where activations go, and what the memory is taken by at its largest."""
    tokens, blocks = plan.facts.tokens, plan.facts.num_blocks
    kept = "on disk" if plan.facts.on_disk else "in memory"
    yield f"{blocks} blocks, {tokens:,} calibration tokens" + (f", activations {kept}" if tokens else "")
    if plan.spilled:
        yield plan.spill_line()
    if plan.low_memory_bytes:
        yield f"what wide layers give is kept; with --low-memory it is computed again: {size(plan.low_memory_bytes)}"
    largest = plan.forecast.largest
    terms = sorted(largest.host.items(), key=lambda term: -term[1])[:SHOWN_TERMS]
    yield f"memory is largest at: {largest.name} ({', '.join(f'{what} {size(count)}' for what, count in terms if count)})"


def _there(count: int | None) -> str:
    return "unknown" if count is None else size(count)
