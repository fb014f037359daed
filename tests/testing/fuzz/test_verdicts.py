import pytest

from bitmend.errors import CheckpointError
from bitmend.testing.fuzz import verdicts as module
from bitmend.testing.fuzz.mutations import MUTATIONS, Mutation
from bitmend.testing.fuzz.verdicts import ALLOWED, KINDS, READERS, Judge


@pytest.fixture(scope="module")
def judge(place):
    return Judge(place)  # one for all: its audit hook stays


@pytest.fixture
def only(judge, monkeypatch):
    """Return a function that leaves one kind, one reader and one mutation."""

    def leave(kind, reader, mutation, change=None, **marks):
        monkeypatch.setattr(judge, "kinds", {kind: (reader,)})
        known = {"values": False, "shapes": False, "refused": False} | marks
        one = MUTATIONS[mutation] if change is None else Mutation(mutation, change, **known)
        monkeypatch.setattr(module, "MUTATIONS", {mutation: one})

        def outcome(seed=0):
            return judge.judge(seed).outcome

        return outcome

    return leave


def nothing(folder, chance):
    return True


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_that_is_not_spoilt_is_the_same(only, kind):
    for reader in dict.fromkeys(KINDS[kind]):
        expected = "refused" if (reader == "quantize" and "plain" not in kind) else "same"
        assert only(kind, reader, "nothing", nothing)() == expected, reader


def test_refusals(only):
    assert only("gptq", "read_quantized", "cut")() == "refused"
    assert only("plain", "quantize", "grow")() == "refused"


def test_values_that_nobody_can_know(only):
    def change(folder, chance):
        path = folder / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        return True

    assert only("plain", "load", "x", change, values=True)() == "other values"
    assert only("plain", "load", "x", change)() == "wrong values"
    assert only("finished", "resume", "x", lambda folder, chance: change(folder / "out", chance))() == "refused"
    outcomes = {only("native", "load", "x", change, values=True)(seed) for seed in range(12)}
    assert outcomes == {"refused", "other values"}  # the second when the checksums were made again


def test_a_reader_that_takes_what_it_must_refuse(only):
    assert only("plain", "load", "x", nothing, refused=True)() == "read, although it must be refused"


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (ValueError("x"), "ValueError"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (CheckpointError("fine"), "refused"),
        (CheckpointError(""), "not one line"),
        (CheckpointError("can't allocate memory"), "refused by the allocator"),
    ],
)
def test_what_is_raised(only, monkeypatch, error, outcome):
    run = only("plain", "load", "nothing", nothing)
    run()

    def fail(folder, place):
        raise error

    monkeypatch.setattr(module, "READERS", READERS | {"load": fail})
    assert run() == outcome


@pytest.mark.parametrize("writes", [True, False])
def test_files_outside(only, monkeypatch, writes):
    run = only("plain", "load", "nothing", nothing)
    run()

    def stray(folder, place):
        (place / "outside").mkdir(exist_ok=True)
        if writes:
            (place / "outside" / "x").write_text("x")
        else:
            with (place / "outside" / "y").open("w"):
                pass
        return {}

    monkeypatch.setattr(module, "READERS", READERS | {"load": stray})
    assert run() == "outside"


def test_some_cases(judge):
    """What `benchmarks/bench_fuzz.py` runs by the thousand, without the limits on time and memory."""
    slow = ("quantize on text", "resume", "quantize")
    found = [judge.judge(seed) for seed in range(100_000, 100_300)]
    assert {verdict.outcome for verdict in found} <= set(ALLOWED), [one for one in found if one.outcome not in ALLOWED]
    assert {verdict.kind for verdict in found} == set(KINDS)
    assert {verdict.reader for verdict in found} >= set(READERS) - set(slow)
