from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch

from bitmend.errors import ModelError, NumericsError, RecipeError
from bitmend.linalg.hadamard import Rotation
from bitmend.models.hf_causal_lm import HfCausalLm
from bitmend.pipeline.transforming import BlockTransforms, Transforms
from bitmend.protocols import Event, TokenBatch, Transformed
from bitmend.transforms.quarot import QuaRot

BATCH = TokenBatch(torch.arange(8).unsqueeze(0) % 2)


@dataclass(frozen=True)
class Spoils:
    """Says that it is exact, and is not."""

    exact: ClassVar[bool] = True
    needs_rows: ClassVar[bool] = False
    factor: float = 1.01

    def apply_(self, block, wiring, streams):
        site = block.sites[-1]
        site.store_(block.module, site.weight(block.module) * self.factor)
        return Transformed(events=(Event("spoiled", site.name, "by a factor"),))


@dataclass(frozen=True)
class Inexact(Spoils):
    exact: ClassVar[bool] = False


@dataclass(frozen=True)
class Rotates:
    """Rotates one input without its weight, or an end."""

    exact: ClassVar[bool] = False
    needs_rows: ClassVar[bool] = False
    ends: dict = field(default_factory=dict)

    def residual_rotation(self, ends):
        return None

    def apply_to_ends_(self, ends):
        return Transformed({ends.norm: Rotation(16)}, events=(Event("told", "ends", "of the ends"),))

    def apply_(self, block, wiring, streams):
        return Transformed({block.sites[-1].path: Rotation(block.sites[-1].shape[1])})


def begun(folder, *parts):
    adapter = HfCausalLm.open(folder)
    transforms = Transforms(adapter, parts, BATCH)
    transforms.begin_()
    adapter.load_block(0)
    return transforms, adapter.describe_block(0, BATCH)


def test_a_transform_that_does_not_keep_the_function_is_refused(tiny_model):
    transforms, block = begun(tiny_model, Spoils())
    with pytest.raises(
        ModelError, match=r"Spoils must keep what model\.layers\.0 computes, but changes it by 0\.0\d+ of"
    ):
        transforms.apply_(block, None)


def test_a_weight_that_is_not_finite_is_named_and_no_transform_blamed(tiny_model):
    for name, what in (
        ("mlp.up_proj", r"weight of model\.layers\.0\.mlp\.up_proj"),
        ("input_layernorm", "input_layernorm.weight"),
    ):
        transforms, block = begun(tiny_model, QuaRot())
        with torch.no_grad():
            block.module.get_submodule(name).weight.view(-1)[3] = float("nan")
        with pytest.raises(NumericsError, match=f"{what} must be finite, but"):
            transforms.apply_(block, None)


def test_an_inexact_transform_is_not_asked_to(tiny_model):
    transforms, block = begun(tiny_model, Inexact())
    done = transforms.apply_(block, None)
    assert done.inputs == {}
    assert [event.kind for event in done.events] == ["spoiled"]


def test_without_transforms_nothing_is_run(tiny_model, monkeypatch):
    transforms, block = begun(tiny_model)
    monkeypatch.setattr(HfCausalLm, "run_block", lambda *rest: pytest.fail("ran"))
    assert transforms.apply_(block, None) == BlockTransforms({}, [], [])


def test_only_one_may_rotate_the_residual_stream(tiny_model):
    with pytest.raises(RecipeError, match="two transforms rotate the residual stream"):
        begun(tiny_model, QuaRot(), QuaRot(seed=1))


def test_only_one_may_rotate_an_input(tiny_model):
    transforms, block = begun(tiny_model, QuaRot(residual=False), QuaRot(residual=False))
    with pytest.raises(RecipeError, match=r"two transforms rotate the input of (self_attn\.o|mlp\.down)_proj"):
        transforms.apply_(block, None)
    with pytest.raises(RecipeError, match=r"two transforms rotate the input of model\.norm"):
        begun(tiny_model, Rotates(), Rotates())


def test_smoothing_behind_a_rotation_that_runs_is_refused_by_order(run_tiny):
    """A factor of each feature does not pass a rotation that mixes them."""
    both = [{"name": "quarot", "force": True}, {"name": "smooth"}]
    with pytest.raises(RecipeError, match=r"Smooth cannot come behind one that rotates .*; put it in front"):
        run_tiny(keys={"weights.bits": 8, "weights.group_size": -1, "transforms": both})


def test_ends_are_transformed_once_and_told_of(tiny_model):
    transforms, block = begun(tiny_model, Rotates())
    assert set(transforms.inputs) == {"model.norm"}
    assert [event.kind for event in transforms.events] == ["told"]
    transforms.begin_()
    assert len(transforms.events) == 1
    assert set(transforms.apply_(block, None).inputs) == {"mlp.down_proj"}


def test_the_rotations_of_a_block_come_off(tiny_model):
    transforms, block = begun(tiny_model, Rotates())
    down = block.module.mlp.down_proj
    assert not down._forward_pre_hooks
    transforms.apply_(block, None)
    assert len(down._forward_pre_hooks) == 1
    transforms.apply_(block, None)
    assert len(down._forward_pre_hooks) == 1
    transforms.release_block()
    assert not down._forward_pre_hooks


def test_massive_features_do_not_hide_what_a_block_adds(tiny, tmp_path):
    model = tiny.build().bfloat16()
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 3] = 3000.0  # as in large language models; blocks add about 1
    folder = tiny.save(tmp_path / "massive", model)
    transforms, block = begun(folder, QuaRot())
    transforms.apply_(block, None)
    transforms, block = begun(folder, Spoils(factor=1.5))
    with pytest.raises(ModelError, match="Spoils must keep"):
        transforms.apply_(block, None)
