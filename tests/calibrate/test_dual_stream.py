import dataclasses

import pytest
import torch

from bitmend.calibrate.dual_stream import BlockRun, DualStream, real_tokens
from bitmend.errors import NumericsError
from bitmend.models.hf_causal_lm import HfCausalLm
from bitmend.numerics.activations import ActivationSpec
from bitmend.online import InputScheme, attach_input
from bitmend.protocols import BlockStreams, Need, TokenBatch

CPU = torch.device("cpu")
ALL = frozenset({Need.INPUT_MOMENT, Need.CROSS_MOMENT, Need.RESIDUAL_MOMENT})
DOWN_PROJ = 3  # index of the group in a llama block


def full_batch(seed, rows=2, length=9):
    return TokenBatch(torch.randint(3, 61, (rows, length), generator=torch.Generator().manual_seed(seed)))


def ragged_batch(seed, pad=0):
    ids = full_batch(seed, 3).ids
    mask = torch.arange(9)[None, :] < torch.tensor([[9], [6], [2]])
    return TokenBatch(torch.where(mask, ids, pad), mask)


BATCHES = {
    "full": [(full_batch(1), False), (full_batch(2), True)],
    "ragged": [(ragged_batch(1), False), (full_batch(3), False), (ragged_batch(2), True)],
}


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    known = {}

    def save(family):
        if family not in known:
            known[family] = tmp_path_factory.mktemp(family)
            tiny.build(family).save_pretrained(known[family])
        return known[family]

    return save


def opened(folder, batches, directory=None, **options):
    adapter = HfCausalLm.open(folder)
    return DualStream(adapter, batches, directory=directory, device=CPU, **options)


def coarse(weight):
    """A rough rounding that changes everything after it."""
    step = weight.abs().max() / 2
    return (weight / step).round() * step


def run_block(streams, index, groups_to_round, keep_inputs=True, **options):
    """Load a block, take its full-precision pass, round some groups, and return the run."""
    streams.adapter.load_block(index)
    block = streams.adapter.describe_block(index, full_batch(0))
    run = BlockRun(streams, block, keep_inputs=keep_inputs, **options)
    for group in groups_to_round:
        for site in block.groups[group].sites:
            site.store_(block.module, coarse(site.weight(block.module)))
    return run


def hooked_inputs(model, path, batches):
    """Return what a layer of a whole model reads: float64 rows of real tokens, one tensor a batch."""
    found = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda _, arguments: found.append(arguments[0]))
    with torch.no_grad():
        for tokens, _ in batches:
            mask = None if tokens.mask is None else tokens.mask.long()
            model(tokens.ids, attention_mask=mask, use_cache=False)
    handle.remove()
    return [real_tokens(x, tokens).double() for x, (tokens, _) in zip(found, batches, strict=True)]


def brute_force(xs, xs_fp):
    x, dx = torch.cat(xs), torch.cat(xs_fp) - torch.cat(xs)
    return {"G": x.T @ x / len(x), "C": dx.T @ x / len(x), "D": dx.T @ dx / len(x)}


def assert_moments(found, expected, tokens):
    assert found.num_tokens == tokens
    for name, value in expected.items():
        # Products are taken in float32: what remains is its rounding, relative to the largest entry.
        torch.testing.assert_close(getattr(found, name), value, rtol=0, atol=3e-6 * float(value.abs().max()))


# ------------------------------------------------------------------------------------------------ two equal streams
@pytest.mark.parametrize("rows", list(BATCHES))
def test_streams_stay_equal_bit_for_bit_when_nothing_is_rounded(tiny, folder, rows, subtests):
    for family in tiny.families:
        with subtests.test(family=family):
            streams = opened(folder(family), BATCHES[rows])
            for index in range(len(streams.adapter.block_names)):
                run = run_block(streams, index, [])
                for group in range(len(run.block.groups)):
                    for moments in run.moments(group, ALL):
                        assert not moments.C.any()
                        assert not moments.D.any()
                        assert moments.G.any()
                assert run.finish_() == 0
                streams.adapter.release_block(index)
            assert len(streams.x_fp) == len(BATCHES[rows])
            for one, other in zip(streams.x_fp, streams.x_q, strict=True):
                assert torch.equal(one, other)


def test_full_precision_stream_is_that_of_the_whole_model(tiny, folder, products_as_run):
    batches = BATCHES["ragged"]
    streams = opened(folder("llama"), batches)
    for index in range(2):
        run_block(streams, index, [0, 1, 2, 3]).finish_()
    model = tiny.build("llama")
    for (tokens, _), hidden, rounded in zip(batches, streams.x_fp, streams.x_q, strict=True):
        mask = None if tokens.mask is None else tokens.mask.long()
        with torch.no_grad(), products_as_run(model, streams.adapter.block_names):
            expected = model(tokens.ids, attention_mask=mask, use_cache=False).logits
        assert torch.equal(streams.adapter.logits(hidden, tokens), expected)
        assert not torch.equal(streams.adapter.logits(rounded, tokens), expected)


# ------------------------------------------------------------------------------------------------ moments
@pytest.mark.parametrize(
    ("family", "layers", "paths"),
    [
        ("llama", "model.layers", ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"]),
        ("gpt2", "transformer.h", ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]),
    ],
)
@pytest.mark.parametrize("rows", list(BATCHES))
def test_moments_equal_those_of_hooked_inputs(tiny, folder, rows, family, layers, paths):
    """In block 1, with block 0 rounded and each group of block 1 rounded after its moments were taken."""
    batches = BATCHES[rows]
    streams = opened(folder(family), batches)
    run = run_block(streams, 0, [0, 1, 2, 3])
    run.finish_()
    run = run_block(streams, 1, [])
    original, rounded = tiny.build(family), tiny.build(family)
    for path in paths:
        for site in run.block.groups[paths.index(path)].sites:
            for layer in (0, 1):  # block 1's own weights do not reach the input that is compared
                name = f"{layers}.{layer}.{site.path}"
                with torch.no_grad():
                    weight = rounded.get_submodule(name).weight
                    weight.copy_(coarse(weight))
    held_out = [mark for _, mark in batches]
    for group, path in enumerate(paths):
        fit, proof = run.moments(group, ALL)
        name = f"{layers}.1.{path}"
        x, x_fp = hooked_inputs(rounded, name, batches), hooked_inputs(original, name, batches)
        for found, wanted in ((fit, False), (proof, True)):
            xs, xs_fp = (
                [rows for rows, mark in zip(one, held_out, strict=True) if mark is wanted] for one in (x, x_fp)
            )
            expected = brute_force(xs, xs_fp)
            assert_moments(found, expected, sum(map(len, xs)))
            asymmetry = (expected["C"] - expected["C"].T).abs().max()
            assert asymmetry > 1e-3 * expected["C"].abs().max()  # else a transposed C would pass
        for site in run.block.groups[group].sites:
            site.store_(run.block.module, coarse(site.weight(run.block.module)))


@pytest.mark.parametrize("whole_residual", [True, False])
@pytest.mark.parametrize("rows", BATCHES)
def test_the_rounding_of_its_own_input_is_part_of_the_residual_or_not(tiny, folder, rows, whole_residual):
    """By hand, at down_proj: the block as it is gives x~ and, with its other groups rounded, what is then rounded to x."""
    batches, spec = BATCHES[rows], ActivationSpec(3)
    run = run_block(opened(folder("llama"), batches), 0, [0, 1, 2], whole_residual=whole_residual)
    handle = attach_input(run.block.module.get_submodule("mlp.down_proj"), InputScheme(activations=spec))
    fit, _ = run.moments(DOWN_PROJ, ALL)
    handle.remove()
    original, rounded = tiny.build("llama"), tiny.build("llama")
    for group in run.block.groups[:DOWN_PROJ]:
        for site in group.sites:
            with torch.no_grad():
                weight = rounded.get_submodule(f"model.layers.0.{site.path}").weight
                weight.copy_(coarse(weight))
    fitted = [pair for pair in batches if not pair[1]]
    x_fp, before = (
        torch.cat(hooked_inputs(one, "model.layers.0.mlp.down_proj", fitted)) for one in (original, rounded)
    )
    x = spec.round(before.float()).double()
    dx = x_fp - (x if whole_residual else before)
    assert torch.allclose(fit.G, x.T @ x / len(x), rtol=1e-4, atol=1e-7)
    assert torch.allclose(fit.C, dx.T @ x / len(x), rtol=1e-3, atol=1e-7)
    assert torch.allclose(fit.D, dx.T @ dx / len(x), rtol=1e-3, atol=1e-7)


def test_only_the_moments_that_are_asked_for(folder):
    streams = opened(folder("llama"), BATCHES["full"])
    run = run_block(streams, 0, [0])
    fit, _ = run.moments(1, frozenset({Need.INPUT_MOMENT}))
    assert (fit.C, fit.D) == (None, None)
    fit, _ = run.moments(1, frozenset({Need.INPUT_MOMENT, Need.CROSS_MOMENT}))
    assert fit.C.any()
    assert fit.D is None


def test_without_held_out_rows_there_are_no_held_out_moments(folder):
    batches = [(tokens, False) for tokens, _ in BATCHES["full"]]
    streams = opened(folder("llama"), batches)
    fit, held_out = run_block(streams, 0, []).moments(0, ALL)
    assert held_out is None
    assert fit.num_tokens == 36
    assert not streams.has_held_out


def test_held_out_rows_never_reach_the_fit_moments(folder):
    def moments_with(seed):
        batches = [(full_batch(1), False), (full_batch(seed), True)]
        streams = opened(folder("llama"), batches)
        return run_block(streams, 0, [0, 1, 2]).moments(DOWN_PROJ, ALL)

    (fit, held_out), (other_fit, other_held_out) = moments_with(2), moments_with(4)
    for name in "GCD":
        assert torch.equal(getattr(fit, name), getattr(other_fit, name))
        assert not torch.equal(getattr(held_out, name), getattr(other_held_out, name))


def test_padding_never_reaches_the_moments(folder):
    def moments_with(pad):
        streams = opened(folder("llama"), [(ragged_batch(1, pad), False), (ragged_batch(2, pad), True)])
        return run_block(streams, 0, [0, 1, 2]).moments(DOWN_PROJ, ALL)

    for one, other in zip(moments_with(0), moments_with(33), strict=True):
        assert one.num_tokens == 17
        for name in "GCD":
            assert torch.equal(getattr(one, name), getattr(other, name))


def test_relative_error_is_of_held_out_real_tokens(folder):
    batches = BATCHES["ragged"]
    streams = opened(folder("llama"), batches)
    found = run_block(streams, 0, [0, 1, 2, 3]).finish_()

    def expected(positions):
        full = torch.cat([real_tokens(streams.x_fp[p], batches[p][0]) for p in positions]).double()
        rounded = torch.cat([real_tokens(streams.x_q[p], batches[p][0]) for p in positions]).double()
        return float((full - rounded).square().mean() / full.square().mean())

    assert found == pytest.approx(expected([2]), rel=1e-9)
    assert abs(expected([0, 1]) / found - 1) > 1e-3  # the rows matter
    streams.batches = [dataclasses.replace(batch, held_out=False) for batch in streams.batches]
    assert streams.relative_error() == pytest.approx(expected([0, 1, 2]), rel=1e-9)


@pytest.mark.parametrize("rows", list(BATCHES))
def test_only_held_out_rows_need_the_full_precision_network(folder, rows):
    batches = BATCHES[rows]
    both = opened(folder("llama"), batches)
    one = opened(folder("llama"), batches, full_precision_of_all=False)
    for index in range(2):
        errors = [run_block(streams, index, [0, 1], keep_inputs=False).finish_() for streams in (both, one)]
        assert errors[0] == errors[1] > 0
    held_out = [position for position, batch in enumerate(both.batches) if batch.held_out]
    for position in range(len(batches)):
        assert torch.equal(both.x_q[position], one.x_q[position])
        if position in held_out or not held_out:
            assert torch.equal(both.x_fp[position], one.x_fp[position])
        else:
            assert one.x_fp[position].numel() == 0


def test_without_held_out_rows_all_of_them_are_judged(folder):
    batches = [(tokens, False) for tokens, _ in BATCHES["ragged"]]
    streams = opened(folder("llama"), batches, full_precision_of_all=False)
    assert run_block(streams, 0, [0, 1], keep_inputs=False).finish_() > 0
    assert all(hidden.numel() for hidden in streams.x_fp)


# ------------------------------------------------------------------------------------------------ on disk
def test_on_disk_everything_is_the_same_and_nothing_is_left(folder, tmp_path):
    results = {}
    for directory in (None, tmp_path / "activations"):
        streams = opened(folder("llama"), BATCHES["ragged"], directory)
        assert streams.x_fp.where == ("memory" if directory is None else "disk")
        run = run_block(streams, 0, [0, 1, 2])
        moments = run.moments(DOWN_PROJ, ALL)
        run.finish_()
        found = [getattr(one, name) for one in moments for name in "GCD"] + list(map(torch.clone, streams.x_q))
        results[directory] = found
        streams.close()
    in_memory, on_disk = results.values()
    assert len(in_memory) == 9
    assert all(torch.equal(one, other) for one, other in zip(in_memory, on_disk, strict=True))
    assert list((tmp_path / "activations").iterdir()) == []


def test_shared_arguments_of_full_rows_are_kept_once(folder):
    streams = opened(folder("llama"), [(full_batch(1), False), (full_batch(2), True), (full_batch(3, length=5), False)])
    first, second, other = (batch.inputs for batch in streams.batches)
    assert first is second
    assert other is not first


# ------------------------------------------------------------------------------------------------ what goes wrong
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("position", [0, 1])
def test_a_bad_activation_names_the_layers_that_read_it(folder, bad, position):
    streams = opened(folder("llama"), BATCHES["full"])
    run = run_block(streams, 0, [])
    hidden = streams.x_q[position].clone()
    hidden[0, 0, 0] = bad
    streams.x_q.replace_(position, hidden)
    sentence = (
        "the input of model.layers.0.self_attn.q_proj, model.layers.0.self_attn.k_proj, "
        "model.layers.0.self_attn.v_proj must be finite, but holds NaN or Inf on the calibration rows; nothing was saved"
    )
    with pytest.raises(NumericsError, match=sentence):
        run.moments(0, ALL)


def test_cross_moments_need_stored_inputs(folder):
    streams = opened(folder("llama"), BATCHES["full"])
    run = run_block(streams, 0, [], keep_inputs=False)
    with pytest.raises(ValueError, match=r"model\.layers\.0: C and D need keep_inputs=True"):
        run.moments(0, ALL)
    assert run.moments(0, frozenset({Need.INPUT_MOMENT}))[0].G.any()


def test_a_group_that_does_not_run_is_told(folder, monkeypatch):
    streams = opened(folder("llama"), BATCHES["full"])
    run = run_block(streams, 0, [])
    monkeypatch.setattr(streams.adapter, "run_block", lambda *_: None)
    with pytest.raises(RuntimeError, match=r"mlp\.down_proj of model\.layers\.0 on batch 0 did not run"):
        run.moments(DOWN_PROJ, ALL)


def test_hooks_are_gone_afterwards(folder):
    streams = opened(folder("llama"), BATCHES["full"])
    run = run_block(streams, 0, [])
    run.moments(DOWN_PROJ, ALL)
    assert not any(module._forward_pre_hooks for module in run.block.module.modules())
    assert isinstance(run, BlockStreams)


def test_largest_inputs_are_of_real_tokens_of_the_fit_split(folder):
    streams = opened(folder("llama"), BATCHES["ragged"])
    streams.adapter.load_block(0)
    block = streams.adapter.describe_block(0, full_batch(0))
    paths = ["self_attn.q_proj", "mlp.down_proj"]
    found = streams.largest_inputs(block, paths)
    run = BlockRun(streams, block, keep_inputs=True)
    for path, group in zip(paths, (0, DOWN_PROJ), strict=True):
        stored = run.fp_inputs[group]
        wanted = torch.cat(
            [real_tokens(stored[n], batch) for n, (batch, held_out) in enumerate(BATCHES["ragged"]) if not held_out]
        )
        assert torch.equal(found[path], wanted.abs().amax(0))
    run.close()
