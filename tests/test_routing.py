import pytest
import torch

from bitmend.routing import Expert, ExpertTokens, RareExperts, entries_by_expert


def test_entries_by_expert_by_brute_force():
    draw = torch.Generator().manual_seed(0)
    index = torch.rand(40, 7, generator=draw).topk(3, dim=-1).indices
    index[index == 5] = 2  # an expert that no token reaches, and one that a token may name twice
    found = entries_by_expert(index, 6)  # number 6 belongs to no expert
    assert len(found) == 6
    for expert, (tokens, slots) in enumerate(found):
        expected = [(t, s) for t in range(40) for s in range(3) if int(index[t, s]) == expert]
        assert list(zip(tokens.tolist(), slots.tolist(), strict=True)) == expected
    assert len(found[5][0]) == 0


def test_no_tokens():
    assert all(len(tokens) == 0 for tokens, _ in entries_by_expert(torch.zeros(0, 2, dtype=torch.long), 3))


def test_path():
    assert Expert("mlp.experts", 3, 0).path == "mlp.experts.3"


@pytest.mark.parametrize(
    ("rare", "fit", "held_out", "width", "required", "treatment"),
    [
        (RareExperts(), 16, 1, 16, 16, "own"),
        (RareExperts(), 15, 9, 16, 16, "pool"),
        (RareExperts(), 16, None, 16, 16, "own"),
        (RareExperts(), 99, 0, 16, 16, "pool"),  # nothing could prove the result
        (RareExperts("rtn", 3), 3, 1, 16, 3, "own"),
        (RareExperts("rtn", 3), 2, 1, 16, 3, "rtn"),
        (RareExperts("refuse", 3), 2, None, 16, 3, "refuse"),
        (RareExperts("pool", 0), 0, None, 16, 1, "pool"),  # moments of no tokens do not exist
    ],
)
def test_judge(rare, fit, held_out, width, required, treatment):
    assert rare.judge(fit, held_out, width) == ExpertTokens(fit, held_out, required, treatment)


def test_shortage():
    assert ExpertTokens(2, 1, 3, "rtn").shortage() == (
        "2 calibration tokens of the fit split reach this expert, but 3 are required"
    )
    assert "no calibration token of the held-out split" in ExpertTokens(9, 0, 3, "rtn").shortage()
