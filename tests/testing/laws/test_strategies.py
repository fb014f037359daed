from hypothesis import HealthCheck, Phase, find, settings

from bitmend.testing.laws.strategies import matrices, problems

# Without making what was found smaller, which takes most of the time and is nothing that is asked for here.
FOUND = settings(phases=[Phase.generate], suppress_health_check=list(HealthCheck), deadline=None, derandomize=True)


def test_the_odd_cases_are_really_drawn():
    assert not find(matrices(), lambda m: m.numel() > 1 and not m.any(), settings=FOUND).any()
    dead = find(problems(), lambda p: bool((p.fit.G.diagonal() == 0).any()) and p.weight.shape[1] > 1, settings=FOUND)
    assert dead.fit.G.shape[0] == dead.weight.shape[1]
    assert find(problems(), lambda p: p.spec.grid.bits == 1 and p.spec.grid.symmetric, settings=FOUND).spec.grid.is_sign
