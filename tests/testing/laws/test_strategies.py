from hypothesis import find

from bitmend.testing.laws.strategies import matrices, problems


def test_the_odd_cases_are_really_drawn():
    assert not find(matrices(), lambda m: m.numel() > 1 and not m.any()).any()
    dead = find(problems(), lambda p: bool((p.fit.G.diagonal() == 0).any()) and p.weight.shape[1] > 1)
    assert dead.fit.G.shape[0] == dead.weight.shape[1]
    assert find(problems(), lambda p: p.spec.grid.bits == 1 and p.spec.grid.symmetric).spec.grid.is_sign
