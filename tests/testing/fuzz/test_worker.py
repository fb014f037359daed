import os
import signal

import pytest

from bitmend.testing.fuzz.verdicts import ALLOWED, KINDS
from bitmend.testing.fuzz.worker import Worker


@pytest.mark.slow
def test_a_process_judges_as_this_one_does_and_comes_back_from_the_dead(place):
    with Worker(place) as worker:
        (first, seconds), (second, _) = worker.judge([7, 8])
        assert first.outcome in ALLOWED
        assert first.kind in KINDS
        assert seconds > 0
        os.kill(worker._process.pid, signal.SIGKILL)
        ((dead, _),) = worker.judge([9])
        assert (dead.seed, dead.outcome) == (9, "died with -9")
        assert [verdict for verdict, _ in worker.judge([7, 8])] == [first, second]
    assert worker._process is None


@pytest.mark.slow
def test_what_takes_too_long_is_stopped(place):
    with Worker(place, seconds=0.0) as worker:
        ((verdict, _),) = worker.judge([7])
    assert verdict.outcome == "hung"


@pytest.mark.slow
def test_what_takes_too_much_memory_is_told(place):
    with Worker(place, memory_bytes=-(1 << 29)) as worker:  # less than it has, so that nothing more is given
        outcomes = {verdict.outcome for verdict, _ in worker.judge(range(10))}
    assert not outcomes <= set(ALLOWED) | {"hung"}, outcomes


def test_a_worker_that_does_not_start(tmp_path):
    (tmp_path / "folders").mkdir()
    with Worker(tmp_path) as worker, pytest.raises(RuntimeError, match="the worker did not start"):
        list(worker.judge([0]))
