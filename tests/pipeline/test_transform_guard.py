"""The guard beside a comparison by hand, and whole runs in which it drops and keeps."""

import json
from contextlib import nullcontext
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from bitmend.calibrate.dual_stream import DualStream
from bitmend.errors import RecipeError
from bitmend.models.hf_causal_lm import HfCausalLm
from bitmend.numerics.granularity import PerChannel
from bitmend.numerics.observers import choose_qparams
from bitmend.numerics.qtensor import QuantSpec, quantize
from bitmend.numerics.uniform import UniformGrid
from bitmend.pipeline.transform_guard import TransformGuard
from bitmend.pipeline.transforming import Transforms
from bitmend.protocols import TRANSFORMS, TokenBatch, Transformed
from bitmend.registry import Entry
from bitmend.transforms.quarot import QuaRot
from bitmend.transforms.smooth import Smooth

ROWS = [(TokenBatch(torch.arange(3 + row, 15 + row).unsqueeze(0)), row % 2 == 0) for row in range(6)]
SPEC = QuantSpec(UniformGrid(3, True), PerChannel(), "minmax", torch.float32)
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Stretches:
    """Keeps the function of an MLP, and makes one column of down_proj a thousand times smaller than the others."""

    exact: ClassVar[bool] = True
    needs_rows: ClassVar[bool] = False
    factor: float = 1000.0

    def apply_(self, block, wiring, streams):
        up, down = block.module.mlp.up_proj.weight.data, block.module.mlp.down_proj.weight.data
        up[3] *= self.factor
        down[:, 3] /= self.factor
        return Transformed({})


@dataclass(frozen=True)
class TurnsFromHere(QuaRot):
    """Rotates the residual stream and spoils the rounding of the blocks."""

    online: bool = False  # else a rotation would stand between the two layers that are stretched

    def apply_(self, block, wiring, streams):
        done = super().apply_(block, wiring, streams)
        Stretches().apply_(block, wiring, streams)
        return done


def guarded(folder, *parts, forced=None, rows=ROWS, dtype=torch.float32):
    adapter = HfCausalLm.open(folder, dtype=dtype)
    transforms = Transforms(adapter, parts, ROWS[0][0], forced)
    transforms.guard = TransformGuard(adapter, lambda site: SPEC, lambda block: nullcontext(), rows, CPU)
    transforms.begin_()
    streams = DualStream(adapter, rows, device=CPU)
    adapter.load_block(0)
    return transforms, adapter.describe_block(0, ROWS[0][0]), streams


def by_hand(folder, change):
    """Error of the first block with all its matrices rounded, over what it adds, on the even rows."""
    adapter = HfCausalLm.open(folder)
    error = size = 0.0
    for rounding in (False, True):
        adapter.load_block(0)
        block = adapter.describe_block(0, ROWS[0][0])
        if rounding:
            change(block)
            for site in block.sites:
                weight = site.weight(block.module)
                site.store_(block.module, quantize(weight, choose_qparams(weight, SPEC), SPEC).dequantize())
        outputs = []
        for tokens, held_out in ROWS:
            if held_out:
                inputs = adapter.block_inputs(tokens)
                outputs.append(adapter.run_block(0, inputs.hidden, inputs) - inputs.hidden)
        if not rounding:
            plain = outputs
    for a, b in zip(plain, outputs, strict=True):
        error, size = error + float((a - b).square().sum()), size + float(a.square().sum())
    return error / size


def test_by_hand(tiny_model):
    transforms, block, streams = guarded(tiny_model, Stretches(1.5))
    (judged,) = transforms.apply_(block, streams).judged
    assert judged.error_without == pytest.approx(by_hand(tiny_model, lambda block: None), rel=1e-4)
    assert judged.error_with == pytest.approx(
        by_hand(tiny_model, lambda block: Stretches(1.5).apply_(block, None, None)), rel=1e-4
    )


def test_a_transform_that_makes_a_block_worse_is_dropped_and_the_block_is_as_before(tiny_model):
    transforms, block, streams = guarded(tiny_model, Stretches())
    before = {name: tensor.clone() for name, tensor in block.module.state_dict().items()}
    done = transforms.apply_(block, streams)
    (judged,) = done.judged
    assert judged.error_with > judged.error_without
    assert not judged.kept
    assert [(event.kind, event.where) for event in done.events] == [("dropped", "model.layers.0")]
    assert "Stretches would raise the error of the rounded block on held-out rows from" in done.events[0].message
    assert all(torch.equal(tensor, before[name]) for name, tensor in block.module.state_dict().items())


def test_a_transform_that_helps_stays(tiny, tmp_path):
    model = tiny.build()
    for block in model.model.layers:
        block.mlp.up_proj.weight.data[3] *= 1000
        block.mlp.down_proj.weight.data[:, 3] /= 1000
    transforms, block, streams = guarded(tiny.save(tmp_path / "stretched", model), Stretches(1 / 1000))
    done = transforms.apply_(block, streams)
    assert done.judged[0].kept
    assert not done.judged[0].forced
    assert done.judged[0].error_with < done.judged[0].error_without
    assert done.events == []
    assert torch.allclose(block.module.mlp.up_proj.weight, tiny.build().model.layers[0].mlp.up_proj.weight)


def test_force_keeps_it_and_says_so(tiny_model):
    transforms, block, streams = guarded(tiny_model, Stretches(), forced=[True])
    done = transforms.apply_(block, streams)
    assert (done.judged[0].kept, done.judged[0].forced) == (True, True)
    assert done.events == []


def test_without_held_out_rows_nothing_is_judged(tiny_model):
    transforms, block, streams = guarded(tiny_model, Stretches(), rows=[(tokens, False) for tokens, _ in ROWS])
    assert transforms.apply_(block, streams).judged == []


def test_a_rotation_of_the_residual_stream_is_judged_once_for_all(tiny_model):
    transforms, block, streams = guarded(tiny_model, TurnsFromHere())
    assert transforms.inputs == {}
    assert [event.kind for event in transforms.events] == ["dropped"]
    assert "the whole model" in transforms.events[0].where
    done = transforms.apply_(block, streams)
    assert not done.judged[0].kept
    assert done.inputs == {}
    plain = HfCausalLm.open(tiny_model)
    assert torch.equal(streams.x_q[0], plain.block_inputs(ROWS[0][0]).hidden)  # the ends have not been touched
    plain.load_block(0)
    assert all(torch.equal(a, b) for a, b in zip(block.module.parameters(), plain.block(0).parameters(), strict=True))
    transforms, block, streams = guarded(tiny_model, TurnsFromHere(), forced=[True])
    assert transforms.apply_(block, streams).judged[0].forced


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_smoothing_before_a_rotation_sees_what_smoothing_alone_sees(tiny, tmp_path, family):
    folder = tiny.save(tmp_path / "model", tiny.build(family))

    def columns(*parts):
        adapter = HfCausalLm.open(folder, dtype=torch.float64)
        transforms = Transforms(adapter, parts, ROWS[0][0])
        transforms.begin_()
        streams = DualStream(adapter, ROWS, device=CPU)
        adapter.load_block(0)
        block = adapter.describe_block(0, ROWS[0][0])
        transforms.apply_(block, streams)
        # What these two write is rotated, which leaves the lengths of their columns.
        return [block.module.get_submodule(path).weight.norm(dim=0) for path in ("self_attn.o_proj", "mlp.down_proj")]

    both = columns(Smooth(0.75), QuaRot(values=False, online=False))
    for alone, before_rotation in zip(columns(Smooth(0.75)), both, strict=True):
        assert torch.allclose(alone, before_rotation)


def test_whole_runs(run_tiny, tmp_path, monkeypatch):
    keys = {"activations.bits": 4, "transforms": [{"name": "smooth"}, {"name": "quarot"}]}
    report = run_tiny(keys=keys)
    first, second = (block.transforms for block in report.blocks)
    assert [one.name for one in first] == ["quarot", "smooth"]  # that of the whole model was judged before
    assert [one.name for one in second] == ["smooth"]
    for one in (*first, *second):
        assert one.kept == (one.error_with <= one.error_without)
    told = json.loads((tmp_path / "out" / "run.json").read_text())["blocks"][0]["transforms"]
    assert told[0] == {
        "name": "quarot",
        "error_without": first[0].error_without,
        "error_with": first[0].error_with,
        "kept": first[0].kept,
        "forced": False,
    }
    with pytest.raises(RecipeError, match="force of a transform must be true or false; got 'yes'"):
        run_tiny(output="other", keys={"transforms": [{"name": "smooth", "force": "yes"}]})


@pytest.mark.parametrize("kind", ["block", "model"])
def test_resume_decides_as_before(run_tiny, interrupted, tmp_path, monkeypatch, kind):
    part = {"block": Stretches, "model": TurnsFromHere}[kind]
    monkeypatch.setitem(TRANSFORMS._entries, "smooth", Entry("smooth", part, "", ""))
    keys = {"transforms": [{"name": "smooth"}]}
    report = run_tiny(keys=keys)
    assert not report.blocks[0].transforms[0].kept
    assert any(event.kind == "dropped" for event in report.events)
    interrupted(10, "stopped", keys=keys)
    again = run_tiny(output="stopped", keys=keys, resume=True)
    assert (tmp_path / "stopped/model.safetensors").read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()
    assert [block.transforms for block in again.blocks] == [block.transforms for block in report.blocks]
