import pytest
import torch

from bitmend.formats.gptq_zero_points import judge_zero_points
from bitmend.formats.read_gptq import GptqConfig, GptqLayer
from bitmend.packing.bits import pack_codes

HALF = 8
OUT = COLUMNS = 32


def layer(zero_point, version, seed=0, mean=0.0):
    """A layer of 4 bits whose weights have about that mean, stored as `version` wants it; zero points may differ."""
    generator = torch.Generator().manual_seed(seed)
    zero_point = zero_point.expand(OUT)
    levels = torch.randn(OUT, COLUMNS, generator=generator) * 1.5 + mean
    codes = (levels.round() + zero_point[:, None]).clamp(0, 15)
    stored = zero_point - (1 if version == 1 else 0)
    return {
        "qweight": pack_codes((codes - HALF).to(torch.int8), 4).T.contiguous(),
        "qzeros": pack_codes((stored - HALF).to(torch.int8)[None], 4),
        "scales": torch.full((1, OUT), 0.01, dtype=torch.float16),
    }


def judged(zero_point, version, claimed, symmetric, count=6):
    tensors, layers = {}, {}
    for number in range(count):
        made = layer(zero_point, version, seed=number)
        tensors |= {f"m{number}.{leaf}": tensor for leaf, tensor in made.items()}
        layers[f"m{number}"] = GptqLayer(f"m{number}", 4, (OUT, COLUMNS), 1, False)
    found, events = judge_zero_points(layers, GptqConfig(4, -1, symmetric, False, False, claimed), tensors)
    (read_as,) = {item.version for item in found.values()}
    return read_as, events


SYMMETRIC = torch.tensor([HALF])
ASYMMETRIC = torch.arange(OUT) % 7 + 5  # 5 .. 11


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(("zero_point", "symmetric"), [(SYMMETRIC, True), (ASYMMETRIC, False)])
def test_a_config_that_is_right_is_followed_without_a_word(version, zero_point, symmetric):
    assert judged(zero_point, version, version, symmetric) == (version, [])


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("symmetric", [True, None])
def test_symmetric_numbers_win_over_a_wrong_config(version, symmetric):
    read_as, (event,) = judged(SYMMETRIC, version, 3 - version, symmetric)
    assert read_as == version
    assert event.kind == "zero_points_contradict"
    assert f"config.json announces zero points of version {3 - version}, but all stored numbers are" in event.message


@pytest.mark.parametrize("version", [1, 2])
def test_a_silent_config_leaves_it_to_the_numbers(version):
    read_as, (event,) = judged(SYMMETRIC, version, None, True)
    assert (read_as, event.kind) == (version, "zero_points_guessed")
    assert f"read as version {version}, because all stored numbers are half the range" in event.message
    read_as, (event,) = judged(ASYMMETRIC, version, None, False)
    assert (read_as, event.kind) == (version, "zero_points_guessed")
    assert "the mean weight is then nearer to 0" in event.message


@pytest.mark.parametrize("version", [1, 2])
def test_an_asymmetric_file_is_read_as_announced_but_doubt_is_said(version):
    read_as, (event,) = judged(ASYMMETRIC, version, 3 - version, False)
    assert (read_as, event.kind) == (3 - version, "zero_points_contradict")
    assert f"read as version {3 - version}, as config.json announces, but the mean weight" in event.message


def test_layers_that_disagree_are_judged_by_the_mean():
    tensors, layers = {}, {}
    for name, zero_point in (("a", SYMMETRIC), ("b", torch.tensor([9]))):
        tensors |= {f"{name}.{leaf}": tensor for leaf, tensor in layer(zero_point, 2).items()}
        layers[name] = GptqLayer(name, 4, (OUT, COLUMNS), 1, False)
    found, (event,) = judge_zero_points(layers, GptqConfig(4, -1, True, False, False, None), tensors)
    assert found["a"].version == 2
    assert "the mean weight" in event.message


def test_zero_points_that_version_one_cannot_hold_are_an_event():
    zero_point = ASYMMETRIC.clone()
    tensors = {f"m.{leaf}": tensor for leaf, tensor in layer(zero_point, 1).items()}
    stored = zero_point - 1
    stored[3] = 15
    tensors["m.qzeros"] = pack_codes((stored - HALF).to(torch.int8)[None], 4)
    layers = {"m": GptqLayer("m", 4, (OUT, COLUMNS), 1, False)}
    _, events = judge_zero_points(layers, GptqConfig(4, -1, False, False, False, 1), tensors)
    assert [event.kind for event in events] == ["zero_points_overflow"]
    assert "1 layers, the first is m, store a zero point that version 1 cannot hold" in events[0].message
