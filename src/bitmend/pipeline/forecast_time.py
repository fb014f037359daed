"""How long a run will take: its operations, counted from the shapes, over rates measured on this machine.

The rates come from `rates.py` and, for the layers of the model, from one timed pass (`calibrate/forward_cost.py`). Other work
on the machine changes all of them while the run goes on; the time left that is shown then is that of the blocks done so far.
"""

from bitmend.calibrate.forward_cost import ForwardCost
from bitmend.linalg.solver_cost import SolverCost
from bitmend.pipeline.forecast import PROOF_IN_DOUBLE, BatchShape, BlockShape, Facts, SiteShape
from bitmend.pipeline.rates import Rates

# Codes are packed when their site is kept, and again with their block.
PACKED = 2
# A file is brought to the disk after each site and each block; how long that takes is the disk's affair, this a usual time.
SECONDS_A_FILE = 0.02
# Copies, checksums and comparison of the finished files, bytes a second; SHA-256 is the slowest part of it.
FINISH_RATE = 3e8
# Passes of a row while rotations are learned; the last stands for rounding and turning what layers read.
LEARNT_PASSES = 5
# Errors that the proof measures: of the candidate on the fit rows; of it and of its base on the held-out rows.
PROOFS, PROOFS_HELD_OUT = 1, 2


def seconds_of(facts: Facts, rates: Rates, *, finished_blocks: int = 0, before: float = 0.0) -> dict[str, float]:
    """Return the seconds of each phase, and `total`.

    Args:
        facts: of the run.
        rates: of this machine.
        finished_blocks: of a run that goes on; they are run once more in both networks, not solved.
        before: seconds that have passed already.
    """
    share = 1 - finished_blocks / max(1, facts.num_blocks)
    load = sum(block.count * 3 * block.weight_bytes for block in facts.blocks) / rates.pass_over
    passes = sum(block.count * _passes(facts, block) for block in facts.blocks)
    whole = sum(block.count * _whole_passes(facts, block) for block in facts.blocks)
    moments = sum(block.count * _moments(facts, block, rates) for block in facts.blocks)
    solve = sum(block.count * _solve(facts, block, rates) for block in facts.blocks)
    prepare = sum(block.count * (_before_solving(facts, block) + _learning(facts, block)) for block in facts.blocks)
    found = {
        "open": before,
        "load": load,
        "prepare": prepare,
        "forward": whole + share * (passes - whole),
        "moments": share * moments,
        "solve": share * solve,
        "compensate": sum(block.count * _compensate(facts, block, rates) for block in facts.blocks),
        "write": _write(facts, rates),
    }
    return found | {"total": sum(found.values())}


# ---------------------------------------------------------------------------------------------- networks
def _macs(block: BlockShape) -> float:
    return sum(site.products for group in block.groups for site in group)


def _passes(facts: Facts, block: BlockShape) -> float:
    """Seconds of all passes: whole ones of both networks, and one up to each group, in which attention is kept."""
    if block.forward is None:
        return 0.0
    planned = facts.runs_of(block)
    runs = sum(run.multiplied for run in planned) / max(1, _macs(block)) if facts.moments and planned else 1.0
    return sum(
        (facts.runs_in_full_precision(batch) + runs) * _layers(block.forward, block, batch.tokens)
        + _whole(facts, batch) * _attention(block.forward, block, batch.tokens, batch.length)
        for batch in facts.batches
    )


def _whole_passes(facts: Facts, block: BlockShape) -> float:
    if block.forward is None:
        return 0.0
    return sum(
        _whole(facts, batch)
        * (_layers(block.forward, block, batch.tokens) + _attention(block.forward, block, batch.tokens, batch.length))
        for batch in facts.batches
    )


def _before_solving(facts: Facts, block: BlockShape) -> float:
    """Seconds of what passes a block for its transforms, ranges and prefix; a run that goes on does a part of it again."""
    if block.forward is None or not facts.rows_before:
        return 0.0
    length = max(batch.length for batch in facts.batches)
    tokens = facts.rows_before * length
    return _layers(block.forward, block, tokens) + _attention(block.forward, block, tokens, length)


def _learning(facts: Facts, block: BlockShape) -> float:
    """Seconds of what transforms learn at a block: without rounding, with it, with it again, and the gradient."""
    if block.forward is None or facts.learning is None:
        return 0.0
    tokens, length = facts.learning.rows * facts.learning.length, facts.learning.length
    return LEARNT_PASSES * (_layers(block.forward, block, tokens) + _attention(block.forward, block, tokens, length))


def _whole(facts: Facts, batch: BatchShape) -> int:
    """How many whole passes a batch makes."""
    return 1 + facts.runs_in_full_precision(batch)


def _seconds_a_mac(forward: ForwardCost, block: BlockShape) -> float:
    timed = forward.timed_tokens
    return forward.seconds / max(1.0, timed * (_macs(block) + forward.attention_macs * timed))


def _layers(forward: ForwardCost, block: BlockShape, tokens: int) -> float:
    return forward.seconds_a_pass + tokens * _macs(block) * _seconds_a_mac(forward, block)


def _attention(forward: ForwardCost, block: BlockShape, tokens: int, length: int) -> float:
    return tokens * length * forward.attention_macs * _seconds_a_mac(forward, block)


# ---------------------------------------------------------------------------------------------- moments and solver
def _moments(facts: Facts, block: BlockShape, rates: Rates) -> float:
    """2 T I^2 operations a moment in float32, and a float64 sum read and written for each batch."""
    total = 0.0
    for group in block.groups:
        square = group[0].width ** 2
        products = 2 * facts.tokens * group[0].rows * square * facts.moments / rates.product
        sums = len(facts.batches) * facts.moments * 20 * square / rates.pass_over
        total += products + sums
    return total


def _solve(facts: Facts, block: BlockShape, rates: Rates) -> float:
    costs = [facts.cost]
    if facts.refits and facts.moments:
        costs.append(facts.cost.again or facts.cost)
    total = 0.0
    for group in block.groups:
        sites = [site for site in group if site.spec is not None]
        if sites:
            total += sum(_shared(cost, group[0].width, rates) for cost in costs)
            total += sum(_site(cost, site, rates) for cost in costs for site in sites)
            total += sum(_proof(facts, site, rates) for site in sites)
    return total


def _compensate(facts: Facts, block: BlockShape, rates: Rates) -> float:
    """Seconds of passes of other rows or another network, of the sums, and of the maps solved for on each fold and on all."""
    about, shape, forward = facts.compensation, block.beside, block.forward
    if about is None or shape is None or forward is None:
        return 0.0
    held_out = sum(batch.tokens for batch in facts.batches if batch.held_out)
    length = max(batch.length for batch in facts.batches)
    tokens = about.local * facts.tokens + held_out
    passes = _layers(forward, block, tokens) + _attention(forward, block, tokens, length)
    d, m = shape.inputs, shape.outputs
    sums = 2 * facts.tokens * block.beside_rows * d * (d + about.targets * m) / rates.product
    solved = (about.folds * about.solved + 2) * 2 * d * d * (d / 3 + 3 * m) / rates.double_product
    return passes + sums + solved


def _shared(cost: SolverCost, width: int, rates: Rates) -> float:
    factors = cost.factors * 4 / 3 * width**3 / rates.factor
    return factors + cost.square_products * 2 * width**3 / rates.double_product


def _site(cost: SolverCost, site: SiteShape, rates: Rates) -> float:
    work = 2 * site.entries * site.width
    # A sweep costs out in^2 operations, half a product, and as much again for each residual term.
    sweeps = cost.sweeps * site.width * rates.sweep_column + cost.copies * site.entries * rates.sweep_entry
    swept = cost.copies * (1 + cost.residual_terms) * work / 2 / rates.product
    products = cost.products * work / rates.product + cost.double_products * work / rates.double_product
    return sweeps + swept + products + cost.searches * site.entries / rates.search


def _proof(facts: Facts, site: SiteShape, rates: Rates) -> float:
    """The scales on the weight, and the errors of candidate and base: an energy, and a product a moment."""
    # Rounding to nearest, and decoding what goes back into the block.
    search = site.entries / rates.search + 2 * site.entries / rates.rounding
    if not facts.batches or not facts.moments:
        return search
    errors = PROOFS + (PROOFS_HELD_OUT if facts.has_held_out else 0)
    # Beside the errors, for each set of rows: an energy, and with two streams W C and W D.
    products = errors + (3 if facts.moments > 1 else 1) * (1 + facts.has_held_out)
    each = 2 * site.entries * site.width
    wide = site.spec is not None and site.spec.grid.bits >= PROOF_IN_DOUBLE
    again = errors * (3 if facts.moments > 1 else 1) * each / rates.double_product if wide else 0.0
    decoded = errors * site.entries / rates.rounding
    return search + decoded + products * each / rates.product + again


def _write(facts: Facts, rates: Rates) -> float:
    codes = sum(block.count * site.entries for block in facts.blocks for site in block.sites)
    files = sum(block.count * (len(block.sites) + 1) for block in facts.blocks)
    written = sum(block.count * block.written_bytes for block in facts.blocks) + facts.outside_bytes
    return PACKED * codes / rates.pack + files * SECONDS_A_FILE + 3 * written / FINISH_RATE
