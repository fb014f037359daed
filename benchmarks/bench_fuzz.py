"""Spoils small model folders of every kind in seeded ways and counts what readers make of them.

    python benchmarks/bench_fuzz.py --cases 10000 --seed 0

Case number N is the same wherever it is run; `--only N` runs one and shows it. What is right and what is a defect stands in
`bitmend/testing/fuzz/verdicts.py`, how a folder is spoilt in `bitmend/testing/fuzz/mutations.py`. A defect makes the
command exit 1.
"""

import argparse
import json
import sys
import tempfile
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bitmend.testing.fuzz.folders import make_folders
from bitmend.testing.fuzz.verdicts import ALLOWED, Verdict
from bitmend.testing.fuzz.worker import Worker


def table(title, counts):
    print(f"\n| {title} | cases | " + " | ".join(ALLOWED) + " | defects |")
    print("|---|" + "---|" * (len(ALLOWED) + 2))
    for name in sorted(counts):
        found = counts[name]
        defects = sum(number for outcome, number in found.items() if outcome not in ALLOWED)
        row = " | ".join(str(found[outcome]) for outcome in ALLOWED)
        print(f"| {name} | {sum(found.values())} | {row} | {defects} |")


def main():
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0, help="number of the first case")
    parser.add_argument("--only", type=int, nargs="*")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=30.0, help="what a case may take")
    parser.add_argument("--json", type=Path, help="write every verdict, one a line; go on where such a file ends")
    parser.add_argument("--tables", type=Path, nargs="*", help="run nothing; print the tables of such files")
    options = parser.parse_args()
    if options.tables:
        report([pair for path in options.tables for pair in known(path)])
        return
    seeds = options.only or list(range(options.seed, options.seed + options.cases))
    started = time.perf_counter()
    before = known(options.json) if options.json and options.json.exists() else []
    seeds = sorted(set(seeds) - {verdict.seed for verdict, _ in before})
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder).resolve()
        make_folders(place / "folders")
        shares = [seeds[start :: options.workers] for start in range(options.workers)]
        with ThreadPoolExecutor(options.workers) as pool:
            done = list(pool.map(lambda item: run_share(place, *item, options), enumerate(shares)))
    verdicts = [*before, *(pair for share in done for pair in share)]
    defects = [verdict for verdict, _ in verdicts if verdict.outcome not in ALLOWED]
    report(verdicts)
    print(f"\n{len(seeds)} cases in {time.perf_counter() - started:.0f} s by {options.workers} workers")
    sys.exit(bool(defects))


def known(path):
    """Return (verdict, seconds) of a file of verdicts."""
    return [(Verdict(**verdict), seconds) for verdict, seconds in map(json.loads, path.read_text().splitlines())]


def run_share(place, number, seeds, options):
    """Run the cases of one worker, and return (verdict, seconds) of each."""
    own = place / f"worker-{number}"
    own.mkdir()
    (own / "folders").symlink_to(place / "folders")
    done = []
    with Worker(own, seconds=options.seconds) as worker:
        for verdict, seconds in worker.judge(seeds):
            done.append((verdict, seconds))
            if verdict.outcome not in ALLOWED:
                print(f"DEFECT {verdict}", file=sys.stderr, flush=True)
            elif options.only:
                print(verdict)
            if options.json:
                with options.json.open("a") as file:
                    file.write(json.dumps([verdict.__dict__, seconds]) + "\n")
            if len(done) % 250 == 0:
                print(f"worker {number}: {len(done)} of {len(seeds)} cases", file=sys.stderr, flush=True)
    return done


def report(verdicts):
    """Print the tables."""
    tables = {"folder": defaultdict(Counter), "reader": defaultdict(Counter), "mutation": defaultdict(Counter)}
    total = Counter()
    for verdict, _ in verdicts:
        total[verdict.outcome] += 1
        tables["folder"][verdict.kind][verdict.outcome] += 1
        tables["reader"][verdict.reader][verdict.outcome] += 1
        for name in verdict.mutations or ("none applied",):
            tables["mutation"][name][verdict.outcome] += 1
    for title, counts in tables.items():
        table(title, counts)
    table("total", {"all": total})
    longest, seed = max((seconds, verdict.seed) for verdict, seconds in verdicts)
    print(f"\nthe longest case, {seed}, took {longest:.2f} s")


if __name__ == "__main__":
    main()
