import pytest
import torch
from torch import nn

from bitmend.calibrate.activation_store import ActivationStore
from bitmend.calibrate.dual_stream import BlockRun, DualStream
from bitmend.calibrate.kept_results import KeptResults, PlannedRun, fingerprint, planned_runs, solved_modules
from bitmend.models.hf_causal_lm import HfCausalLm
from bitmend.protocols import Need, TokenBatch
from bitmend.sites import Block, LinearSite, SiteGroup

CPU = torch.device("cpu")
ALL = frozenset({Need.INPUT_MOMENT, Need.CROSS_MOMENT, Need.RESIDUAL_MOMENT})


def batch(seed, masked=False):
    ids = torch.randint(3, 61, (3, 9), generator=torch.Generator().manual_seed(seed))
    return TokenBatch(ids, torch.arange(9)[None, :] < torch.tensor([[9], [6], [2]]) if masked else None)


BATCHES = [(batch(1, masked=True), False), (batch(3), False), (batch(2, masked=True), True)]


@pytest.fixture
def opened(tiny, tmp_path):
    def open_(family="llama", directory=None, keep_wide=False):
        folder = tmp_path / family
        if not folder.exists():
            tiny.build(family).save_pretrained(folder)
        return DualStream(HfCausalLm.open(folder), BATCHES, directory=directory, device=CPU, keep_wide=keep_wide)

    return open_


def coarse(weight):
    step = weight.abs().max() / 2
    return (weight / step).round() * step


def block_run(streams):
    streams.adapter.load_block(0)
    return BlockRun(streams, streams.adapter.describe_block(0, batch(0)), keep_inputs=True)


def whole_block(streams):
    """Ask for the moments of each group, round it, and return all moments and the output."""
    run = block_run(streams)
    found = []
    for index, group in enumerate(run.block.groups):
        moments = run.moments(index, ALL)
        found += [getattr(one, name) for one in moments if one is not None for name in "GCD"]
        for site in group.sites:
            site.store_(run.block.module, coarse(site.weight(run.block.module)))
    run.finish_()
    return [*found, *map(torch.clone, streams.x_q)]


@pytest.fixture
def computed(monkeypatch):
    """A list that gets (key, batch) for each result that is computed, and nothing for those that are kept."""
    seen = []
    original = KeptResults.result

    def count(self, key, position, arguments, compute):
        return original(self, key, position, arguments, lambda: seen.append((key, position)) or compute())

    monkeypatch.setattr(KeptResults, "result", count)
    return seen


# ------------------------------------------------------------------------------------------------ nothing changes
@pytest.mark.parametrize(
    ("on_disk", "keep_wide"),
    [
        (True, True),
        *(pytest.param(*one, marks=pytest.mark.slow) for one in ((False, False), (True, False), (False, True))),
    ],
)
def test_it_changes_no_bit(tiny, opened, monkeypatch, tmp_path, on_disk, keep_wide, subtests):
    for family in (*tiny.families, *tiny.expert_families):
        with subtests.test(family=family):
            with monkeypatch.context() as patch:
                patch.setattr(KeptResults, "result", lambda self, key, position, arguments, compute: compute())
                anew = whole_block(opened(family))
            kept = whole_block(opened(family, tmp_path / "activations" if on_disk else None, keep_wide))
            assert len(kept) == len(anew)
            assert all(torch.equal(one, other) for one, other in zip(kept, anew, strict=True))


def test_everything_in_a_llama_block_is_computed_once_but_for_its_wide_layers(opened, computed):
    whole_block(opened())
    narrow = [f"self_attn.{name}_proj" for name in "qkv"]
    # The run up to o computes q, k, v and attention; the next one o, as a part of the whole attention; then all is kept.
    assert computed == [
        *((key, position) for position in range(3) for key in (*narrow, "attention 0")),
        *(("self_attn", position) for position in range(3)),
    ]


def test_wide_layers_are_computed_once_where_there_is_room(opened, computed):
    whole_block(opened(keep_wide=True))
    for layer in ("mlp.gate_proj", "mlp.up_proj"):
        assert [key for key in computed if key[0] == layer] == [(layer, position) for position in range(3)]


CHANGES = {
    "an earlier group": lambda run, streams: [
        site.store_(run.block.module, coarse(site.weight(run.block.module))) for site in run.block.groups[0].sites
    ],
    "a norm": lambda run, streams: run.block.module.input_layernorm.weight.data.mul_(1.5),
    "another parameter": lambda run, streams: setattr(
        run.block.module.self_attn.q_proj,
        "weight",
        nn.Parameter(2 * run.block.module.self_attn.q_proj.weight.detach()),
    ),
    "the input": lambda run, streams: streams.x_q.replace_(0, 2 * streams.x_q[0] + 1),
}


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("group", [1, 2, 3])
def test_it_is_computed_anew_when_anything_before_it_changes(opened, what, group):
    def moments(warm):
        streams = opened()
        run = block_run(streams)
        if warm:
            run.moments(group, ALL)  # keeps everything as it is in full precision
        CHANGES[what](run, streams)
        found = run.moments(group, ALL)
        # The new result is kept in place of the old one.
        return [getattr(one, name) for one in (*found, *run.moments(group, ALL)) for name in "GCD"]

    with_kept, without = moments(True), moments(False)
    assert with_kept[1].any()
    assert all(torch.equal(one, other) for one, other in zip(with_kept, without, strict=True))


def test_the_block_is_as_it_was_afterwards(opened):
    streams = opened()
    run = block_run(streams)
    run.moments(3, ALL)
    assert not any("forward" in module.__dict__ for module in run.block.module.modules())
    own = run.block.module.self_attn.forward
    run.block.module.self_attn.forward = own  # as accelerate does
    run.moments(3, ALL)
    assert run.block.module.self_attn.__dict__["forward"] is own


# ------------------------------------------------------------------------------------------------ memory
def test_what_lies_inside_a_kept_module_is_let_go(opened):
    run = block_run(opened())
    kept = run._kept._kept
    run.moments(1, ALL)
    assert set(kept) == {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "attention 0"}
    run.moments(2, ALL)
    assert "self_attn" in kept
    run.moments(3, ALL)
    assert set(kept) == {"self_attn"}
    run.finish_()
    assert not kept


def test_activations_on_disk_are_gone_at_the_end(opened, tmp_path):
    folder = tmp_path / "activations"
    streams = opened(directory=folder)
    whole_block(streams)
    streams.close()
    assert not list(folder.iterdir())


# ------------------------------------------------------------------------------------------------ other wirings
class TwoAttentions(nn.Module):
    """A block that attends twice, and writes to the results as if they were its own."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)

    def forward(self, x):
        for layer in (self.first, self.second):
            heads = layer(x).unsqueeze(1)
            x = nn.functional.scaled_dot_product_attention(heads, heads, heads).mul_(2).squeeze(1)
        return x


class Tupled(nn.Module):
    """A part that returns what it computes among other things."""

    def __init__(self, form):
        super().__init__()
        self.layer, self.form = nn.Linear(8, 8, bias=False), form

    def forward(self, x):
        return self.form(self.layer(x))


class Around(nn.Module):
    def __init__(self, part, pick):
        super().__init__()
        self.part, self.last, self.pick = part, nn.Linear(8, 8, bias=False), pick

    def forward(self, x):
        return self.last(self.pick(self.part(x)))


def block_of(module, *paths):
    sites = [LinearSite(f"m.0.{path}", path, "linear", (8, 8)) for path in paths]
    return Block("m.0", 0, module, tuple(SiteGroup(site.path, (site,), None) for site in sites))


def test_several_attentions_are_told_apart_and_may_be_written_to(computed):
    torch.manual_seed(0)
    module, x = TwoAttentions(), torch.randn(2, 5, 8)
    kept = KeptResults(block_of(module, "first", "second"), ActivationStore, CPU)
    with torch.no_grad():
        expected = module(x)
        for _ in range(3):
            with kept.of_batch(0):
                assert torch.equal(module(x), expected)
    assert computed == [("attention 0", 0), ("attention 1", 0)]
    kept.close()
    with torch.no_grad(), kept.of_batch(0):
        assert torch.equal(module(x), expected)  # after closing it starts again


@pytest.mark.parametrize(
    ("form", "pick", "is_kept"),
    [
        (lambda y: (y, None), lambda given: given[0], True),
        (lambda y: (None, y, None), lambda given: given[1], True),
        (lambda y: (y, 2 * y), lambda given: given[1], False),
        (lambda y: [y], lambda given: given[0], False),
        (lambda y: {"y": y}, lambda given: given["y"], False),
    ],
)
def test_forms_of_results(form, pick, is_kept, computed):
    torch.manual_seed(0)
    module, x = Around(Tupled(form), pick), torch.randn(2, 5, 8)
    kept = KeptResults(block_of(module, "part.layer", "last"), ActivationStore, CPU)
    kept.solved_before_(1)
    with torch.no_grad():
        expected = module(x)
        for _ in range(2):
            with kept.of_batch(0):
                assert torch.equal(module(x), expected)
    assert computed == [("part", 0)] * (1 if is_kept else 2)


def test_the_last_run_keeps_nothing_more():
    torch.manual_seed(0)
    module = Around(Tupled(lambda y: y), lambda given: given)
    kept = KeptResults(block_of(module, "part.layer", "last"), ActivationStore, CPU)
    kept.solved_before_(2)
    with torch.no_grad(), kept.of_batch(0):
        module(torch.randn(2, 8))
    assert not kept._kept


# ------------------------------------------------------------------------------------------------ what is solved
def test_solved_modules_of_a_llama_block(opened):
    block = block_run(opened()).block
    q, k, v = (f"self_attn.{name}_proj" for name in "qkv")
    assert [solved_modules(block, index) for index in range(5)] == [
        (),
        (q, k, v),
        ("self_attn",),
        ("self_attn",),  # up and gate are wider than the block's input
        ("self_attn", "mlp"),
    ]
    assert solved_modules(block, 3, wide=True) == ("self_attn", "mlp.gate_proj", "mlp.up_proj")


def test_planned_runs_of_a_llama_block(opened):
    block = block_run(opened()).block
    sizes = {site.path.rpartition(".")[2]: site.shape[0] * site.shape[1] for site in block.sites}
    hidden = block.groups[0].sites[0].shape[1]
    narrow = sum(site.shape[0] for site in block.groups[0].sites)
    wide = sizes["up_proj"] + sizes["gate_proj"]
    qkv = sizes["q_proj"] + sizes["k_proj"] + sizes["v_proj"]
    assert planned_runs(block) == (
        PlannedRun(0, False, 0),
        PlannedRun(narrow, True, qkv),
        PlannedRun(narrow + hidden, True, sizes["o_proj"]),
        PlannedRun(hidden, False, wide),
        PlannedRun(hidden, False, wide + sizes["down_proj"]),
    )
    given = sum(site.shape[0] for site in block.groups[2].sites)
    assert planned_runs(block, wide=True)[3:] == (
        PlannedRun(hidden + given, False, wide),
        PlannedRun(hidden + given, False, sizes["down_proj"]),
    )


# ------------------------------------------------------------------------------------------------ fingerprints
@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("columns", [3, 8])
def test_a_fingerprint_sees_values_places_shapes_and_types(dtype, columns):
    values = torch.zeros(2, columns).to(dtype)
    values[0, 1], values[0, 2], values[1, 2] = 1, 1, 1
    others = [
        values.flip(1),
        values.T.contiguous(),
        values.flatten(),
        values.logical_not().to(dtype),
        values.to(torch.float16),
    ]
    prints = [fingerprint(one) for one in (values, *others)]
    assert len(set(prints)) == len(prints)
    assert fingerprint(values.T.contiguous().T) == prints[0]


def test_a_fingerprint_looks_into_lists_and_mappings():
    x = torch.arange(4.0)
    one = fingerprint(((x, None), {"scale": 0.5, "tables": (x, x + 1)}))
    assert one == fingerprint(((x.clone(), None), {"tables": (x, x + 1), "scale": 0.5}))
    for other in (
        ((x, 0), {"scale": 0.5, "tables": (x, x + 1)}),
        ((x, None), {"scale": 0.25, "tables": (x, x + 1)}),
        ((x, None), {"scale": 0.5, "tables": (x, x)}),
        ((x, None), {"size": 0.5, "tables": (x, x + 1)}),
        ((x, None), {"scale": object(), "tables": (x, x + 1)}),
    ):
        assert fingerprint(other) != one
