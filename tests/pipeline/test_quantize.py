import gc
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from bitmend.errors import FactorizationError, NumericsError
from bitmend.models.hf_causal_lm import HfCausalLm
from bitmend.pipeline.quantize import quantise_blocks
from bitmend.pipeline.recipe import parse_recipe
from bitmend.protocols import Event, Need, RunReport, SilentProgress, TokenBatch, Transformed
from bitmend.solvers.rtn import Rtn

CPU = torch.device("cpu")
SITES = [
    f"{group}.{name}"
    for group, names in (("self_attn", "qkvo"), ("mlp", ("gate", "up", "down")))
    for name in (f"{letter}_proj" for letter in names)
]


def batch(seed, rows=3):
    return TokenBatch(torch.randint(3, 61, (rows, 10), generator=torch.Generator().manual_seed(seed)))


BATCHES = [(batch(1), False), (batch(2), False), (batch(3), True)]


def empty_report():
    return RunReport("tiny", {}, {}, {})


def run(adapter, keys, batches=BATCHES, **options):
    """Return report and finished blocks."""
    report = empty_report()
    keys = {**keys, "weights": {"group_size": 8, "observer": "minmax", **keys.get("weights", {})}}
    blocks = quantise_blocks(adapter, parse_recipe(keys), batches, report, SilentProgress(), device=CPU, **options)
    return report, list(blocks)


@pytest.fixture
def adapter(tiny_model):
    return HfCausalLm.open(tiny_model)


@pytest.fixture
def make_adapter(tiny, tmp_path):
    """Return a function that opens a tiny model after a change to it."""

    def make(change, family="llama", **keys):
        model = tiny.build(family, **keys)
        with torch.no_grad():
            change(model)
        return HfCausalLm.open(tiny.save(tmp_path / "changed", model))

    return make


@pytest.fixture
def recorder(add_part):
    """A solver that rounds to nearest and keeps the moments and whatever `look` returns at each site."""

    class Record:
        fit: ClassVar[dict] = {}
        held_out: ClassVar[dict] = {}
        seen: ClassVar[list] = []
        look = staticmethod(lambda problem: None)

    record = type("Record", (Record,), {"fit": {}, "held_out": {}, "seen": []})

    @dataclass(frozen=True)
    class Recorder:
        needs: ClassVar[frozenset[Need]] = frozenset(
            {Need.INPUT_MOMENT, Need.CROSS_MOMENT, Need.RESIDUAL_MOMENT, Need.HELD_OUT}
        )

        def solve(self, problem):
            # Copies, because the moments of all rows take the place of these.
            record.fit[problem.site.name] = deepcopy(problem.fit)
            record.held_out[problem.site.name] = deepcopy(problem.held_out)
            record.seen.append(record.look(problem))
            return Rtn().solve(problem)

        def solve_again(self, problem, judged):
            return judged

    add_part.solver("recorder", Recorder)
    return record


def with_weights(model, blocks):
    """Put the dequantised weights of finished blocks into a whole model."""
    for block in blocks:
        for name, qtensor in block.sites.items():
            with torch.no_grad():
                model.get_submodule(name).weight.copy_(qtensor.dequantize())
    return model


def inputs_of(model, name, batches):
    found = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, arguments: found.append(arguments[0]))
    with torch.no_grad():
        for tokens, _ in batches:
            model(tokens.ids, use_cache=False)
    handle.remove()
    return torch.cat([x.flatten(0, 1) for x in found]).double()


# ------------------------------------------------------------------------------------------------ what solvers see
def test_every_group_sees_all_groups_before_it_quantised(adapter, recorder, tiny):
    """Moments of every site equal those of the network in which everything before the site is quantised."""
    _, blocks = run(adapter, {"solver": {"name": "recorder"}, "weights": {"bits": 2}})
    original, quantised = tiny.build(), with_weights(tiny.build(), blocks)
    assert list(recorder.fit) == [f"model.layers.{index}.{site}" for index in (0, 1) for site in SITES]
    for name, moments in recorder.fit.items():
        x = inputs_of(quantised, name, BATCHES[:2])
        dx = inputs_of(original, name, BATCHES[:2]) - x
        for found, expected in ((moments.G, x.T @ x), (moments.C, dx.T @ x), (moments.D, dx.T @ dx)):
            expected = expected / len(x)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float((x.T @ x / len(x)).abs().max()))
        held_out = inputs_of(quantised, name, BATCHES[2:])
        torch.testing.assert_close(recorder.held_out[name].G, held_out.T @ held_out / 30, rtol=1e-4, atol=1e-5)
    drift = recorder.fit["model.layers.1.mlp.down_proj"]
    assert drift.D.trace() > 1e-2 * drift.G.trace()  # the two networks differ by far more than the tolerance


def test_down_proj_reads_another_input_when_gate_is_quantised(tiny_model, recorder):
    inputs = []
    for skip in (False, True):
        keys = {"solver": {"name": "recorder"}, "overrides": [{"targets": ["re:.*gate_proj"], "skip": skip}]}
        run(HfCausalLm.open(tiny_model), {**keys, "weights": {"bits": 2}})
        inputs.append(dict(recorder.fit))
        recorder.fit.clear()
    quantised, skipped = inputs
    down, gate, up = (f"model.layers.0.mlp.{name}_proj" for name in ("down", "gate", "up"))
    assert not torch.equal(quantised[down].G, skipped[down].G)
    assert torch.equal(quantised[up].G, skipped[up].G)
    assert gate in quantised
    assert gate not in skipped


def test_one_block_is_loaded_at_a_time(adapter, recorder):
    def loaded():
        return [
            index
            for index in range(len(adapter.block_names))
            if any(not parameter.is_meta for parameter in adapter.block(index).parameters())
        ]

    recorder.look = lambda problem: (problem.site.name.split(".")[2], loaded())
    run(adapter, {"solver": {"name": "recorder"}})
    assert len(recorder.seen) == 14
    assert all(found == [int(index)] for index, found in recorder.seen)
    assert loaded() == []


# ------------------------------------------------------------------------------------------------ what is reported
def test_block_errors_are_those_of_the_two_networks_on_held_out_rows(adapter, tiny):
    report, blocks = run(adapter, {"weights": {"bits": 2}})
    original, quantised = tiny.build(), with_weights(tiny.build(), blocks)
    assert [block.name for block in report.blocks] == ["model.layers.0", "model.layers.1"]
    states = []
    for model in (original, quantised):
        with torch.no_grad():
            states.append(model(BATCHES[2][0].ids, output_hidden_states=True).hidden_states)
    full, rounded = (state[1].double() for state in states)  # the last state has gone through the final norm
    expected = float((full - rounded).square().sum() / full.square().sum())
    assert expected > 1e-4
    assert report.blocks[0].relative_error == pytest.approx(expected, rel=1e-5)
    assert report.blocks[1].relative_error > report.blocks[0].relative_error


def test_without_anything_quantised_the_error_is_zero(adapter):
    report, blocks = run(adapter, {"overrides": [{"targets": ["re:.*"], "skip": True}]})
    assert [block.relative_error for block in report.blocks] == [0.0, 0.0]
    assert all(block.sites == {} for block in blocks)


def test_report_lists_sites_in_order_with_times(adapter):
    report, _ = run(adapter, {})
    for block in report.blocks:
        assert [site.name for site in block.sites] == [f"{block.name}.{site}" for site in SITES]
        assert block.seconds >= sum(site.seconds for site in block.sites) > 0
        assert all(site.held_out_error is not None for site in block.sites)
    assert set(report.seconds) == {"embed", "load", "forward", "solve", "moments"}
    assert all(seconds > 0 for seconds in report.seconds.values())


def test_layers_that_never_ran_are_told(adapter, monkeypatch):
    describe = adapter.describe_block
    monkeypatch.setattr(
        adapter, "describe_block", lambda *arguments: replace(describe(*arguments), unread=("mlp.expert",))
    )
    report, _ = run(adapter, {"solver": {"name": "rtn"}})
    told = [(event.kind, event.where, event.degrades) for event in report.events]
    assert told == [("unread", f"model.layers.{index}.mlp.expert", True) for index in (0, 1)]
    assert "the layer never ran, so nothing is known of its input; not quantised" in report.events[0].message


# ------------------------------------------------------------------------------------------------ what comes out
def test_blocks_hold_every_tensor_once(adapter, tiny):
    _, blocks = run(adapter, {"overrides": [{"targets": ["re:.*o_proj"], "skip": True}]})
    original = tiny.build().state_dict()
    for index, block in enumerate(blocks):
        assert block.name == f"model.layers.{index}"
        replaced = {f"{name}.weight" for name in block.sites}
        assert replaced | set(block.rest) == {name for name in original if name.startswith(block.name)}
        assert not replaced & set(block.rest)
        assert set(block.kinds) == set(block.sites)
        assert f"{block.name}.self_attn.o_proj.weight" in block.rest
        assert all(torch.equal(tensor, original[name]) for name, tensor in block.rest.items())


def test_conv1d_is_quantised_as_out_by_in(make_adapter):
    _, blocks = run(make_adapter(lambda model: None, "gpt2"), {})
    assert set(blocks[0].kinds.values()) == {"conv1d"}
    assert blocks[0].sites["transformer.h.0.mlp.c_fc"].codes.shape == (24, 16)
    assert "transformer.h.0.mlp.c_fc.bias" in blocks[0].rest


def test_a_solver_without_needs_runs_without_rows_and_gives_the_same_with_them(tiny_model):
    (without, blocks), (with_rows, others) = (
        run(HfCausalLm.open(tiny_model), {"solver": {"name": "rtn"}}, batches) for batches in ([], BATCHES)
    )
    assert [block.relative_error for block in without.blocks] == [None, None]
    assert all(block.relative_error > 0 for block in with_rows.blocks)
    for one, other in zip(blocks, others, strict=True):
        assert all(torch.equal(one.sites[name].codes, other.sites[name].codes) for name in one.sites)


def test_activations_on_disk_give_the_same_codes_and_are_removed(tiny_model, tmp_path):
    results = [run(HfCausalLm.open(tiny_model), {}, directory=place)[1] for place in (None, tmp_path / "activations")]
    for one, other in zip(*results, strict=True):
        assert all(torch.equal(one.sites[name].codes, other.sites[name].codes) for name in one.sites)
    assert list((tmp_path / "activations").iterdir()) == []


# ------------------------------------------------------------------------------------------------ transforms
@dataclass(frozen=True)
class ScaleNorm:
    """Multiplies the gain of the first norm and divides the columns of what reads it."""

    exact: ClassVar[bool] = True
    needs_rows: ClassVar[bool] = False
    factor: float = 4.0

    def apply_(self, block, wiring, streams):
        group = block.groups[0]
        with torch.no_grad():
            block.module.get_submodule(group.norm).weight.mul_(self.factor)
        for site in group.sites:
            site.store_(block.module, site.weight(block.module) / self.factor)
        return Transformed()


def test_an_exact_transform_keeps_the_function_and_reaches_the_file(tiny_model, add_part, tiny):
    add_part.transform("scale_norm", ScaleNorm)
    skip = {"overrides": [{"targets": ["re:.*"], "skip": True}]}
    transforms = {"transforms": [{"name": "scale_norm", "factor": 4.0}]}
    report, blocks = run(HfCausalLm.open(tiny_model), {**skip, **transforms})
    assert [block.relative_error for block in report.blocks] == [0.0, 0.0]  # both streams see the transformed block
    original = tiny.build()
    changed = tiny.build()
    for block in blocks:
        changed.load_state_dict(block.rest, strict=False)
        gain = f"{block.name}.input_layernorm.weight"
        assert torch.equal(block.rest[gain], 4 * original.state_dict()[gain])
    ids = BATCHES[0][0].ids
    with torch.no_grad():
        assert torch.equal(changed(ids).logits, original(ids).logits)  # a power of two is exact


def test_solvers_see_the_transformed_block(tiny_model, add_part, recorder):
    add_part.transform("scale_norm", ScaleNorm)
    moments = []
    for transforms in ([], [{"name": "scale_norm"}]):
        run(HfCausalLm.open(tiny_model), {"solver": {"name": "recorder"}, "transforms": transforms})
        moments.append(recorder.fit["model.layers.0.self_attn.q_proj"].G)
    assert torch.equal(moments[1], 16 * moments[0])


def test_a_transform_tells_its_events(tiny_model, add_part):
    @dataclass(frozen=True)
    class Talks:
        exact: ClassVar[bool] = True
        needs_rows: ClassVar[bool] = False

        def apply_(self, block, wiring, streams):
            return Transformed(events=(Event("talk", block.name, "hello"),))

    add_part.transform("talks", Talks)
    report, _ = run(HfCausalLm.open(tiny_model), {"solver": {"name": "rtn"}, "transforms": [{"name": "talks"}]})
    assert [event.where for event in report.events] == ["model.layers.0", "model.layers.1"]


# ------------------------------------------------------------------------------------------------ what goes wrong
def test_a_bad_weight_names_its_site_in_a_later_block(make_adapter):
    def change(model):
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("inf")

    for keys, batches in (({"solver": {"name": "rtn"}}, []),):
        with pytest.raises(
            NumericsError, match=r"the weight of model\.layers\.1\.mlp\.up_proj must be finite, but 1 of"
        ):
            run(make_adapter(change), keys, batches)


def test_a_block_whose_output_overflows_is_refused(make_adapter):
    def change(model):
        model.model.layers[1].mlp.up_proj.weight.mul_(1e25)
        model.model.layers[1].mlp.down_proj.weight.mul_(1e20)

    keys = {"solver": {"name": "rtn"}, "weights": {"scale_dtype": "float32"}}
    with pytest.raises(NumericsError, match=r"the output of model\.layers\.1 must be finite, but holds NaN or Inf"):
        run(make_adapter(change), keys)


def test_a_quantised_stream_alone_that_overflows_is_refused(adapter, add_part):
    """The full-precision output is finite, so that the relative error is infinite and not NaN."""

    @dataclass(frozen=True)
    class Explodes:
        needs: ClassVar[frozenset[Need]] = frozenset()

        def solve(self, problem):
            solution = Rtn().solve(problem)
            if problem.site.path != "mlp.down_proj":
                return solution
            qparams = replace(solution.qtensor.qparams, scale=torch.full_like(solution.qtensor.qparams.scale, 3e38))
            codes = solution.qtensor.codes.clamp(0, 1)
            return replace(solution, qtensor=replace(solution.qtensor, qparams=qparams, codes=codes))

    add_part.solver("explodes", Explodes)
    with pytest.raises(NumericsError, match=r"the output of model\.layers\.0 must be finite"):
        run(adapter, {"solver": {"name": "explodes"}})


def test_scales_that_overflow_name_the_site(adapter, add_part):
    @dataclass(frozen=True)
    class Overflows:
        needs: ClassVar[frozenset[Need]] = frozenset()

        def solve(self, problem):
            solution = Rtn().solve(problem)
            qparams = replace(solution.qtensor.qparams, scale=solution.qtensor.qparams.scale * float("inf"))
            return replace(solution, qtensor=replace(solution.qtensor, qparams=qparams))

    add_part.solver("overflows", Overflows)
    with pytest.raises(
        NumericsError, match=r"the quantised weight of model\.layers\.0\.self_attn\.q_proj must be finite"
    ):
        run(adapter, {"solver": {"name": "overflows"}})


def test_indefinite_moments_name_the_site(adapter, monkeypatch):
    def fail(*arguments):
        raise FactorizationError("the second moment stays indefinite")

    monkeypatch.setattr("bitmend.linalg.moments.factor_inverse", fail)
    with pytest.raises(
        FactorizationError, match=r"solver gptq at model\.layers\.0\.self_attn\.q_proj: the second moment"
    ):
        run(adapter, {})


def test_streams_are_closed_when_a_run_fails(adapter, monkeypatch, tmp_path):
    monkeypatch.setattr(
        "bitmend.linalg.moments.factor_inverse", lambda *_: (_ for _ in ()).throw(FactorizationError("x"))
    )
    with pytest.raises(FactorizationError):
        run(adapter, {}, directory=tmp_path / "activations")
    gc.collect()
    assert list((tmp_path / "activations").iterdir()) == []


def test_the_few_rows_hold_tokens_of_every_vocabulary(adapter):
    tokens = adapter.few_rows()
    assert tokens.mask is None
    assert tokens.ids.shape == (1, 8)
    assert set(tokens.ids.unique().tolist()) == {0, 1}
