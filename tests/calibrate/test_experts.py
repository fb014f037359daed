import copy
from collections import OrderedDict

import pytest
import torch

from bitmend.calibrate.dual_stream import BlockRun, DualStream, real_tokens
from bitmend.calibrate.experts import LayerInputs, read_by
from bitmend.errors import CalibrationError, ModelError, NumericsError
from bitmend.models.hf_causal_lm import HfCausalLm
from bitmend.protocols import Need, TokenBatch
from bitmend.routing import ExpertTokens, RareExperts

CPU = torch.device("cpu")
ALL = frozenset({Need.INPUT_MOMENT, Need.CROSS_MOMENT, Need.RESIDUAL_MOMENT})
ONE = frozenset({Need.INPUT_MOMENT})
OWN = RareExperts("pool", 1)


def batch(seed, rows=4, length=9, ragged=False):
    ids = torch.randint(3, 61, (rows, length), generator=torch.Generator().manual_seed(seed))
    if not ragged:
        return TokenBatch(ids)
    mask = torch.arange(length)[None, :] < torch.tensor([9, 6, 2, 7])[:, None]
    return TokenBatch(torch.where(mask, ids, 0), mask)


BATCHES = {
    "full": [(batch(1), False), (batch(2), False), (batch(3), True)],
    "ragged": [(batch(1, ragged=True), False), (batch(4), False), (batch(2, ragged=True), True)],
}


@pytest.fixture
def opened(tiny, tmp_path):
    """Return a function that opens a tiny mixture of experts, after a change to it, and its streams."""

    def make(family="qwen3-moe", rows="full", change=None, directory=None, **keys):
        model = tiny.build(family, **keys)
        if change is not None:
            with torch.no_grad():
                change(model)
        folder = tmp_path / f"{family}-{rows}"
        model.save_pretrained(folder)
        return DualStream(HfCausalLm.open(folder), BATCHES[rows], directory=directory, device=CPU)

    return make


def coarse(weight):
    step = weight.abs().max() / 2
    return (weight / step).round() * step


def round_(block, groups):
    for group in groups:
        for site in group.sites:
            site.store_(block.module, coarse(site.weight(block.module)))


def open_block(streams, index=0, rare=OWN, keep_inputs=True):
    streams.adapter.load_block(index)
    block = streams.adapter.describe_block(index, batch(0))
    return BlockRun(streams, block, keep_inputs=keep_inputs, rare_experts=rare)


def experts(run):
    return [(index, group) for index, group in enumerate(run.block.groups) if group.expert is not None]


def layer_calls(streams, module, index, hidden, path="mlp.experts"):
    """Return, batch by batch, what a layer of experts is called with when the block runs on `hidden`."""
    calls = []
    hook = module.get_submodule(path).register_forward_pre_hook(lambda _, arguments: calls.append(arguments))
    for position, one in enumerate(streams.batches):
        streams.adapter.run_block(index, hidden[position], one.inputs)
    hook.remove()
    return calls


def expected_rows(streams, module, fp_module, calls, fp_calls, group, position, tokens=None):
    """Return by brute force, token by token, what a group reads of one batch in both networks."""
    expert, rows = group.expert, streams.batches[position].tokens
    real = torch.ones(rows.ids.numel(), dtype=torch.bool) if rows.mask is None else rows.mask.flatten()
    x, x_fp = [], []
    for token in range(rows.ids.numel()):
        wanted = expert.number in calls[position][1][token] if tokens is None else True
        if real[token] and wanted:
            pair = []
            for which, source in ((module, calls), (fp_module, fp_calls)):
                one = source[position][0][token : token + 1]
                if expert.step == 1:
                    parts = which.get_submodule(expert.path)
                    gate, up = parts.get_submodule("gate_proj"), parts.get_submodule("up_proj")
                    one = torch.nn.functional.silu(gate(one)) * up(one)
                pair.append(one)
            x.append(pair[0])
            x_fp.append(pair[1])
    return x, x_fp


def brute_force(streams, module, fp_module, calls, fp_calls, group, held_out, tokens=None):
    xs, xs_fp = [], []
    for position, one in enumerate(streams.batches):
        if one.held_out == held_out:
            x, x_fp = expected_rows(streams, module, fp_module, calls, fp_calls, group, position, tokens)
            xs, xs_fp = xs + x, xs_fp + x_fp
    x = torch.cat(xs).detach().double()
    dx = torch.cat(xs_fp).detach().double() - x
    return len(x), {"G": x.T @ x / len(x), "C": dx.T @ x / len(x), "D": dx.T @ dx / len(x)}


def assert_moments(found, expected):
    count, moments = expected
    assert found.num_tokens == count
    for name, value in moments.items():
        # Products are taken in float32, and one row alone is multiplied in another order than many together.
        torch.testing.assert_close(getattr(found, name), value, rtol=0, atol=1e-5 * float(value.abs().max()))


def assert_consistent(moments):
    """The moments of pairs of rows are positive semidefinite together, whatever the rows are."""
    both = torch.cat([torch.cat([moments.G, moments.C.T], 1), torch.cat([moments.C, moments.D], 1)])
    assert torch.linalg.eigvalsh(both).min() >= -1e-6 * float(both.diagonal().max())


# ------------------------------------------------------------------------------------------------ against brute force
@pytest.mark.parametrize("rows", list(BATCHES))
@pytest.mark.parametrize("rare", [OWN, RareExperts("pool", 10**6)], ids=["own", "pooled"])
def test_moments_against_brute_force_over_all_tokens(opened, rows, rare):
    streams = opened(rows=rows)
    run = open_block(streams, rare=rare)
    fp_module = copy.deepcopy(run.block.module)
    groups = experts(run)
    round_(run.block, [group for group in run.block.groups if group.expert is None])  # attention: routing changes
    fp_calls = _calls_of_copy(streams, run, fp_module)
    tokens = None if rare is OWN else "all"
    flipped = 0
    for index, group in groups:
        if group.expert.step == 1 and group.expert.number == 0:
            round_(run.block, [other for _, other in groups if other.expert.step == 0])
        calls = layer_calls(streams, run.block.module, 0, streams.x_q)
        flipped += sum(
            int((one[1].sort().values != two[1].sort().values).sum()) for one, two in zip(calls, fp_calls, strict=True)
        )
        for held_out, found in enumerate(run.moments(index, ALL)):
            expected = brute_force(streams, run.block.module, fp_module, calls, fp_calls, group, bool(held_out), tokens)
            assert_moments(found, expected)
            assert_consistent(found)
            assert found.D.any()
    assert flipped > 0  # both networks do route differently


def _calls_of_copy(streams, run, fp_module):
    """Return what the full-precision copy of the block is called with."""
    calls = []
    hook = fp_module.get_submodule("mlp.experts").register_forward_pre_hook(
        lambda _, arguments: calls.append(arguments)
    )
    with torch.no_grad():
        for position, one in enumerate(streams.batches):
            args, kwargs = one.inputs.arguments[run.block.index]
            fp_module(streams.x_q[position], *args, **kwargs)  # before the first block both streams are the same
    hook.remove()
    return calls


@pytest.mark.parametrize("rows", list(BATCHES))
def test_streams_stay_equal_bit_for_bit_when_nothing_is_rounded(tiny, opened, rows, subtests):
    for family in tiny.expert_families:
        with subtests.test(family=family):
            streams = opened(family, rows)
            for index in range(len(streams.adapter.block_names)):
                run = open_block(streams, index)
                for group in range(len(run.block.groups)):
                    for moments in run.moments(group, ALL):
                        if moments is not None:
                            assert not moments.C.any()
                            assert not moments.D.any()
                assert run.finish_() == 0


def test_one_stream_sees_the_same_tokens_as_two(opened):
    streams = opened()
    run = open_block(streams)
    alone = open_block(streams, keep_inputs=False)
    for index, _ in experts(run):
        both, one = run.moments(index, ALL)[0], alone.moments(index, ONE)[0]
        assert torch.equal(both.G, one.G)
        assert one.C is None
        assert run.expert_tokens(index) == alone.expert_tokens(index)
    with pytest.raises(ValueError, match="C and D need keep_inputs=True"):
        alone.moments(experts(run)[0][0], ALL)


def test_the_order_in_which_groups_are_asked_for_does_not_matter(opened):
    run, other = (open_block(opened(rows="ragged")) for _ in range(2))
    groups = [index for index, _ in experts(run)]
    forwards = {index: run.moments(index, ALL) for index in groups}
    for index in reversed(groups):
        for one, two in zip(other.moments(index, ALL), forwards[index], strict=True):
            assert torch.equal(one.G, two.G)
            assert torch.equal(one.C, two.C)
            assert torch.equal(one.D, two.D)


def test_the_block_runs_once_for_all_experts(opened, monkeypatch):
    streams = opened()
    run = open_block(streams)
    calls = []
    original = streams.adapter.run_block
    monkeypatch.setattr(streams.adapter, "run_block", lambda *given: calls.append(None) or original(*given))
    for index, _ in experts(run):
        run.expert_tokens(index)
        run.moments(index, ALL)
    assert len(calls) == len(streams.batches)


def test_activations_on_disk(opened, tmp_path):
    run, other = open_block(opened()), open_block(opened(directory=tmp_path / "kept"))
    for index, _ in experts(run):
        assert torch.equal(run.moments(index, ALL)[0].C, other.moments(index, ALL)[0].C)
    assert any((tmp_path / "kept").iterdir())
    other.close()
    other.streams.close()
    assert not list((tmp_path / "kept").iterdir())


def test_a_shared_expert_is_measured_on_all_tokens(opened):
    run = open_block(opened("qwen2-moe", rows="ragged"))
    index = next(i for i, group in enumerate(run.block.groups) if "shared_expert." in group.name)
    assert run.expert_tokens(index) is None
    assert run.moments(index, ALL)[0].num_tokens == sum(
        one.tokens.num_tokens for one in run.streams.batches if not one.held_out
    )


# ------------------------------------------------------------------------------------------------ too few tokens
def never(model):
    """Make of the logits of experts 0 and 1 one number and its opposite, of 2 and 3 zero: one choice never falls on these."""
    for layer in model.model.layers:
        layer.mlp.gate.weight[0] = torch.randn(16, generator=torch.Generator().manual_seed(1))
        layer.mlp.gate.weight[1] = -layer.mlp.gate.weight[0]
        layer.mlp.gate.weight[2:] = 0


def test_an_expert_that_no_token_reaches(opened):
    streams = opened(change=never, num_experts_per_tok=1)
    run = open_block(streams, rare=OWN)
    (index, down) = next((i, i + 4) for i, group in experts(run) if group.expert.number == 3)
    for one in (index, down):
        assert run.expert_tokens(one) == ExpertTokens(0, 0, 1, "pool")
        fit, held_out = run.moments(one, ALL)
        assert (fit.num_tokens, held_out.num_tokens) == (72, 36)
        assert fit.G.isfinite().all()
        assert fit.G.any()


def test_pooled_moments_are_shared_but_not_what_solvers_remember_of_them(opened):
    run = open_block(opened(change=never, num_experts_per_tok=1))
    first, second = (run.moments(index, ALL)[0] for index, group in experts(run)[2:4])
    assert first.G is second.G
    first.remember("something", lambda: 1)
    assert second.remember("something", lambda: 2) == 2


def test_refusing_names_the_expert(opened):
    run = open_block(opened(change=never, num_experts_per_tok=1), rare=RareExperts("refuse", 1))
    sentence = (
        r"model\.layers\.0\.mlp\.experts\.3: 0 calibration tokens of the fit split reach this expert, but 1 are required; "
        r"give more calibration rows, or set calibration\.rare_experts to 'pool' or 'rtn'"
    )
    for ask in (lambda index: run.expert_tokens(index), lambda index: run.moments(index, ALL)):
        with pytest.raises(CalibrationError, match=sentence):
            ask(experts(run)[3][0])


def test_a_layer_that_does_not_read_every_token_is_refused():
    layer = LayerInputs(torch.nn.ModuleList([torch.nn.Identity()]))
    with pytest.raises(ModelError, match="reads 5 rows for a batch of 36 tokens, need one row for each"):
        layer.add_(torch.zeros(5, 4), torch.zeros(5, 1, dtype=torch.long), batch(0), held_out=False)


def test_inputs_that_are_not_finite_are_refused(opened):
    streams = opened()
    run = open_block(streams)
    with torch.no_grad():
        run.block.module.get_submodule("post_attention_layernorm").weight[3] = float("nan")
    index = next(index for index, _ in experts(run) if run.expert_tokens(index).fit > 0)
    with pytest.raises(NumericsError, match=r"the input of .*experts.* must be finite"):
        run.moments(index, ONE)


def test_a_layer_that_does_not_run_is_an_error_of_ours():
    with pytest.raises(RuntimeError, match=r"two\.inner did not run"):
        read_by(torch.nn.Sequential(OrderedDict(one=torch.nn.Identity(), two=Skipped())), "two.inner", torch.zeros(1))


class Skipped(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Identity()

    def forward(self, x):
        return x


def test_padding_reaches_no_expert(opened):
    run = open_block(opened(rows="ragged"))
    rows = [one.tokens for one in run.streams.batches]
    real = sum(one.num_tokens for one in rows)
    counts = [run.expert_tokens(index) for index, group in experts(run) if group.expert.step == 0]
    assert sum(one.fit + one.held_out for one in counts) == 2 * real  # two experts a token
    assert real_tokens(torch.zeros(*rows[0].ids.shape, 1), rows[0]).shape[0] == rows[0].num_tokens
