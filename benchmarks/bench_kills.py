"""Kills runs at random moments, goes on with them, and compares what comes out with a run that was never stopped.

    python benchmarks/bench_kills.py --model books-7m --kills 100 --seed 0

Half of the kills come at a moment drawn uniformly over the time of an uninterrupted run. The other half come at a file
operation of the run on its output (a file opened, synchronised, renamed or removed, a folder made or removed), drawn
uniformly over all of them, just before it happens: writing takes a small share of the time, so that moments alone would
hardly ever meet it. Just before a file is synchronised its last bytes are still in the process, so that it is torn.

SIGKILL each time; the process tidies nothing up. After each kill the same request goes on with `--resume`, and with
probability 1/2 is killed again, until it ends. In every fourth run OUTPUT is an older model that the run may replace.

What is compared: all files of OUTPUT by their bytes; run.json apart from `seconds`, `peak_memory_bytes`, the forecast's
`host_bytes` and `host_bytes_ahead` and keys that end in `_seconds`. After each kill OUTPUT must not exist (be the older
model, to the byte, where it is to be replaced) or be whole; at the end nothing may lie beside OUTPUT.

The model may be any folder that bitmend quantises; `tiny` is a random llama of two blocks, `tiny-moe` a random Mixtral of two
blocks with four experts, two for each token. Processes are forked from one
that has made one run itself, so that everything is imported, with torch and the tokenizer on one thread.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)

import bitmend
from bitmend import assets
from bitmend.errors import QuantizationError
from bitmend.formats import record, safetensors_file, writer

FILE_OPERATIONS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir")
FAILED, AGAIN = 3, 0.5
VOCABULARY = 64


@dataclass
class Request:
    """What every run of a series is asked for."""

    model: Path
    recipe: str
    texts: list[Path]
    keys: dict
    place: Path

    @property
    def output(self):
        return self.place / "out"

    def run(self, **options):
        bitmend.quantize(self.model, self.recipe, self.texts, output=self.output, overrides=self.keys, **options)


# ---------------------------------------------------------------------------------------------- one process
def fork(work):
    """Run `work()` in a child and return its number; the child exits with 0, or FAILED after a sentence."""
    child = os.fork()
    if child:
        return child
    try:
        work()
        os._exit(0)
    except QuantizationError as error:
        os.write(2, f"    {error}\n".encode())
        os._exit(FAILED)
    except BaseException as error:
        os.write(2, f"    {type(error).__name__}: {error}\n".encode())
        os._exit(FAILED + 1)


def watch_files(place, act):
    """Call `act(name)` in this process just before each file operation inside `place`, and before each synchronisation."""
    prefix = str(place)

    def hook(event, arguments):
        if event in FILE_OPERATIONS and any(isinstance(one, (str, Path)) and prefix in str(one) for one in arguments):
            act(event)

    def synchronise(file, original=safetensors_file.sync):
        act("sync")
        original(file)

    for module in (record, safetensors_file, writer):
        module.sync = synchronise
    sys.addaudithook(hook)


def count_operations(request):
    """Return how many file operations an uninterrupted run makes; leaves its output."""
    reader, end = os.pipe()

    def work():
        seen = []
        watch_files(request.place, seen.append)
        request.run()
        os.write(end, str(len(seen)).encode())

    child = fork(work)
    _, status = os.waitpid(child, 0)
    if status:
        raise SystemExit("the uninterrupted run failed")
    return int(os.read(reader, 100))


def run_killed_at_operation(request, number, log, **options):
    """Run until the file operation of that number; return whether it was killed, and the exit status."""

    def work():
        seen = 0

        def act(name):
            nonlocal seen
            seen += 1
            if seen == number:
                Path(log).write_text(name)
                os.kill(os.getpid(), signal.SIGKILL)

        watch_files(request.place, act)
        request.run(**options)

    _, status = os.waitpid(fork(work), 0)
    return status


def run_killed_at_moment(request, moment, **options):
    """Run for `moment` seconds (None: to the end) and return the exit status."""
    started = time.perf_counter()
    child = fork(lambda: request.run(**options))
    while moment is not None and time.perf_counter() - started < moment:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        time.sleep(0.002)
    if moment is not None:
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


# ---------------------------------------------------------------------------------------------- what is compared
def snapshot(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def timeless(value):
    if isinstance(value, dict):
        # The forecast of memory starts from what the process holds when it is made.
        measured = ("seconds", "peak_memory_bytes", "host_bytes", "host_bytes_ahead")
        return {
            key: timeless(one) for key, one in value.items() if key not in measured and not key.endswith("_seconds")
        }
    return [timeless(one) for one in value] if isinstance(value, list) else value


def difference(found, expected):
    """Return the name of a file in which two snapshots differ, or None."""
    for name in sorted(set(found) | set(expected)):
        if name not in found or name not in expected:
            return name
        one, other = found[name], expected[name]
        if name == "run.json":
            one, other = timeless(json.loads(one)), timeless(json.loads(other))
        if one != other:
            return name
    return None


def stage(request):
    """Say in words how far a killed run had come."""
    partial = request.place / "out.partial"
    if not partial.exists():
        return "before anything was written" if not request.output.exists() else "after the end"
    parts = [path.name for path in (partial / "parts").glob("*.safetensors")] if (partial / "parts").exists() else []
    if (partial / "model").exists():
        return "putting the output together"
    if request.output.exists() and not (partial / "journal").exists():
        return "tidying up"
    return f"{len(parts)} parts finished" if (partial / "journal" / "journal.json").exists() else "opening the journal"


# ---------------------------------------------------------------------------------------------- the series
@dataclass
class Tally:
    """What came of it."""

    kills: Counter = field(default_factory=Counter)
    stages: Counter = field(default_factory=Counter)
    tenths: Counter = field(default_factory=Counter)
    runs: int = 0
    most_kills_of_a_run: int = 0
    started_again: int = 0
    problems: list = field(default_factory=list)


def one_run(request, whole, older, seconds, operations, draw, tally):
    """Start, kill and go on until the output is there, then compare."""
    tally.runs += 1
    replaces = older is not None and tally.runs % 4 == 0
    for name in ("out", "out.partial", "out.replaced"):
        shutil.rmtree(request.place / name, ignore_errors=True)
    before = None
    if replaces:
        shutil.copytree(older, request.output)
        before = snapshot(request.output)
    options, kills = {"overwrite": True} if replaces else {}, 0
    while True:
        status = attempt(request, seconds, operations, draw, tally, options, kill=not kills or draw.random() < AGAIN)
        if not os.WIFSIGNALED(status):
            if status and replaces and os.WEXITSTATUS(status) == FAILED and options == {"resume": True}:
                # Killed before it was written down that the older model may be replaced: the user has to say so again.
                tally.started_again += 1
                options = {"overwrite": True}
                continue
            break
        kills += 1
        check_after_kill(request, whole, before, tally)
        options = {"resume": True}
    tally.most_kills_of_a_run = max(tally.most_kills_of_a_run, kills)
    check_at_end(request, whole, status, kills, tally)


def check_after_kill(request, whole, before, tally):
    tally.stages[stage(request)] += 1
    if request.output.exists():
        found = snapshot(request.output)
        if difference(found, whole) is not None and found != before:
            tally.problems.append(f"run {tally.runs}: OUTPUT is neither absent nor whole after a kill")


def check_at_end(request, whole, status, kills, tally):
    if status:
        tally.problems.append(f"run {tally.runs}: ended with status {status}")
    elif (name := difference(snapshot(request.output), whole)) is not None:
        tally.problems.append(f"run {tally.runs}: {name} differs after {kills} kills")
    left = sorted(path.name for path in request.place.iterdir() if path.name.startswith("out") and path.name != "out")
    if left:
        tally.problems.append(f"run {tally.runs}: {', '.join(left)} is left over")


def attempt(request, seconds, operations, draw, tally, options, kill):
    """Run once, killed or not, and return the exit status."""
    if not kill:
        return run_killed_at_moment(request, None, **options)
    if draw.random() < 0.5:
        moment = draw.uniform(0, seconds)
        status = run_killed_at_moment(request, moment, **options)
        if os.WIFSIGNALED(status):
            tally.kills["at a moment"] += 1
            tally.tenths[int(10 * moment / seconds)] += 1
        return status
    log = request.place / "operation"
    status = run_killed_at_operation(request, draw.randint(1, operations), log, **options)
    if os.WIFSIGNALED(status):
        tally.kills[f"before {log.read_text()}"] += 1
    return status


def tiny_model(folder, experts):
    """Save a random model of two blocks, dense or of experts, with a tokenizer, and a text of its words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    if experts:
        model = MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=4, num_experts_per_tok=2))
    else:
        model = LlamaForCausalLM(LlamaConfig(**sizes))
    model.save_pretrained(folder)
    tokenizer = Tokenizer(WordLevel({f"w{number}": number for number in range(VOCABULARY)}, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)
    draw = random.Random(0)
    text = folder.with_name("words.txt")
    text.write_text(" ".join(f"w{draw.randrange(VOCABULARY)}" for _ in range(2000)))
    return folder, text


def cut_to_blocks(source, folder, count):
    """Save the first blocks of a model as a model, so that a run is short."""
    model = AutoModelForCausalLM.from_pretrained(source)
    model.model.layers = model.model.layers[:count]
    model.config.num_hidden_layers = count
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def request_of(options, place):
    keys = {"calibration.sequences": options.sequences, "calibration.sequence_length": options.length}
    keys |= {"weights.bits": options.bits, "weights.group_size": options.group_size, "weights.observer": "minmax"}
    if options.blocks:
        model = cut_to_blocks(assets.path(options.model), place / "source", options.blocks)
        text = assets.path("books-calibration")
    elif options.model in ("tiny", "tiny-moe"):
        model, text = tiny_model(place / "tiny", experts=options.model == "tiny-moe")
    else:
        model = Path(options.model) if Path(options.model).is_dir() else assets.path(options.model)
        text = Path(options.text) if options.text else assets.path("books-calibration")
    return Request(model, options.recipe, [text], keys, place)


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="books-7m", help="an asset, a folder, `tiny` or `tiny-moe`")
    parser.add_argument("--blocks", type=int, default=0, help="only the first blocks of an asset; 0 for all")
    parser.add_argument("--text", help="calibration text; books-calibration unless given")
    parser.add_argument("--recipe", default="gptq")
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--group-size", type=int, default=-1)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=60.0, help="begin no run after this time")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads do not survive a fork
    draw, tally, started = random.Random(options.seed), Tally(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder).resolve()
        request = request_of(options, place)
        request.run()  # here, so that children find everything imported
        shutil.rmtree(request.output)
        operations = count_operations(request)
        whole = snapshot(request.output)
        shutil.rmtree(request.output)
        times = []
        for _ in range(3):
            begin = time.perf_counter()
            run_killed_at_moment(request, None)
            times.append(time.perf_counter() - begin)
            name = difference(snapshot(request.output), whole)
            if name is not None:
                raise SystemExit(f"two uninterrupted runs differ in {name}")
            shutil.rmtree(request.output)
        seconds = sorted(times)[1]
        older = Request(request.model, "rtn", [], {"weights.group_size": options.group_size}, place)
        run_killed_at_moment(older, None)
        (place / "out").rename(place / "older")
        print(f"{options.model}: {seconds:.2f} s and {operations} file operations in an uninterrupted run", flush=True)
        last = time.perf_counter() + 60 * options.minutes
        while sum(tally.kills.values()) < options.kills and time.perf_counter() < last:
            one_run(request, whole, place / "older", seconds, operations, draw, tally)
    show(options, tally, time.perf_counter() - started)


def show(options, tally, seconds):
    total = sum(tally.kills.values())
    print(f"{options.model}, seed {options.seed}: {total} kills in {tally.runs} runs, {seconds:.0f} s")
    print(
        f"  most kills of one run: {tally.most_kills_of_a_run}; told to pass --overwrite again: {tally.started_again}"
    )
    for title, counts in (("kills", tally.kills), ("how far the run was", tally.stages)):
        print(f"  {title}: " + ", ".join(f"{name} {count}" for name, count in sorted(counts.items())))
    print("  kills at a moment, by tenths of the run: " + " ".join(str(tally.tenths[tenth]) for tenth in range(10)))
    print(f"  problems: {len(tally.problems)}")
    for problem in tally.problems:
        print(f"    {problem}")


if __name__ == "__main__":
    main()
