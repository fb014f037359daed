import torch

from bitmend.numerics.qtensor import QuantSpec
from bitmend.numerics.uniform import UniformGrid
from bitmend.pipeline import rates as module
from bitmend.pipeline.rates import measure_rates


def test_rates_are_positive_and_of_the_right_kind(monkeypatch):
    monkeypatch.setattr(module, "LARGEST_SIDE", 96)
    monkeypatch.setattr(module, "SEARCHED_ENTRIES", 2**10)
    monkeypatch.setattr(module, "OUT_OF_CACHE", 2**12)
    found = measure_rates(4096, QuantSpec(UniformGrid(3, symmetric=False)), torch.device("cpu"))
    assert min(found.product, found.double_product, found.factor, found.pass_over, found.search, found.pack) > 1e3
    assert found.sweep_column >= 0
    assert found.sweep_entry >= 0
    assert found.sweep_column + found.sweep_entry > 0


def test_the_clock_is_read_after_a_warm_up(monkeypatch):
    times = iter([0.0, 9.0, 10.0, 13.0, 20.0, 22.0])  # 9 s to warm up, then 3 s and 2 s
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(times))
    assert module._seconds(lambda: None, torch.device("cpu")) == 2.0
