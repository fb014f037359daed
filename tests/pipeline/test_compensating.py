"""Whole runs with maps beside blocks: what was fitted is what is stored, loads and computes; what does harm is dropped."""

import json

import pytest
import torch
import transformers
from torch import nn

import bitmend
from bitmend.calibrate.data import Split, load_calibration
from bitmend.compensation import Compensation
from bitmend.errors import CheckpointError, RecipeError, RequestError
from bitmend.formats.compressed_tensors import CompressedTensors
from bitmend.formats.ledger import ledger
from bitmend.formats.manifest import Manifest
from bitmend.models.tokenizer import load_tokenizer
from bitmend.pipeline.compensating import Compensating, _across, place_of
from bitmend.pipeline.recipe import load_recipe, parse_recipe
from bitmend.sites import Block, LinearSite, SiteGroup

KEPT = {"gate": "in_sample", "structure": "full"}  # so that random models keep their maps
MANY = {"weights.bits": 2, "calibration.sequences": 80}  # so that there is something to learn


def qwt(**keys):
    return {"weights.bits": 3, "compensators": [{"name": "qwt", **(KEPT | keys)}]}


def held_out_rows(folder, text, count=8):
    rows = load_calibration([text], load_tokenizer(folder), sequences=count, sequence_length=12, held_out=0.25, seed=0)
    splits = zip(rows.batches(1), rows.split_of_batch(1), strict=True)
    return torch.cat([row.ids for row, split in splits if split is Split.HELD_OUT])


def behind(model, path, ids):
    """Return what a block of the model gives."""
    seen = []
    handle = model.get_submodule(path).register_forward_hook(
        lambda module, arguments, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.no_grad():
        model(ids)
    handle.remove()
    return seen[0]


def relative(found, wanted):
    return float((found - wanted).square().sum() / wanted.square().sum())


LAST = {"llama": "model.layers.1", "gpt2": "transformer.h.1", "neox": "gpt_neox.layers.1", "mixtral": "model.layers.1"}


@pytest.mark.parametrize("structure", ["bias", "affine", "low_rank", "block_diagonal", "full", "auto"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "neox", "mixtral"])
def test_the_loaded_model_is_the_one_that_was_fitted(run_tiny, tiny, tiny_text, tmp_path, family, structure):
    if structure not in ("full", "low_rank") and family != "llama":
        pytest.skip("structures are the same for all families")
    folder = tiny.save(tmp_path / "model", tiny.build(family))
    more = {"groups": 2} if structure == "block_diagonal" else {}
    report = run_tiny(model=folder, recipe="rtn", keys=qwt(structure=structure, target="trajectory", **more))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = held_out_rows(folder, tiny_text)
    found = behind(model, LAST[family], ids)
    error = relative(found, behind(tiny.build(family), LAST[family], ids))
    assert error == pytest.approx(report.blocks[-1].relative_error, rel=1e-3)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for block in plain.modules():
        if "compensation" in block._modules:
            block._forward_hooks.clear()
    assert not torch.equal(behind(plain, LAST[family], ids), found)


@pytest.mark.parametrize("target", ["local", "trajectory", "mix"])
def test_a_map_takes_error_away(run_tiny, target):
    report = run_tiny(recipe="rtn", keys={**qwt(target=target, gate="held_out"), **MANY})
    for block in report.blocks:
        about = block.compensation
        assert about["kept"] == (about["removed_held_out"] > 0)
        if about["kept"] and target != "local":
            assert block.relative_error < about["error_without"]
    assert any(block.compensation["kept"] for block in report.blocks)


def test_a_local_target_is_the_block_on_the_same_input(run_tiny, monkeypatch):
    """With blocks that round nothing, nothing is lacking locally, whatever came before; of the trajectory it still is."""
    seen = {}

    def watch(self, problem, real=bitmend.compensators.qwt.QwT.fit):
        seen[self.target, problem.where] = problem.held_out.moments().energy(0)
        return real(self, problem)

    monkeypatch.setattr(bitmend.compensators.qwt.QwT, "fit", watch)
    skip = [{"targets": ["re:.*layers.1.*"], "skip": True}, {"targets": ["re:.*layers.0.*"], "bits": 2}]
    for target in ("local", "trajectory"):
        run_tiny(output=target, recipe="rtn", keys={**qwt(structure="bias", target=target), "overrides": skip})
    assert seen["local", "model.layers.1"] == 0
    assert seen["trajectory", "model.layers.1"] > 0
    assert seen["local", "model.layers.0"] == pytest.approx(seen["trajectory", "model.layers.0"], rel=1e-6)


@pytest.mark.parametrize("k", [1, 8, 11])
def test_a_stopped_run_ends_alike(ends_alike, k):
    ends_alike(k, recipe="rtn", keys=qwt(target="mix", structure="auto"))


def test_what_the_model_gives_decides_in_the_end(run_tiny, monkeypatch, tmp_path):
    run_tiny(output="with", recipe="rtn", keys=qwt())
    real = Compensating.judge

    def worse(self, streams):
        found, _ = real(self, streams)
        return found | {"kept": 0.0}, []

    monkeypatch.setattr(Compensating, "judge", worse)
    dropped = run_tiny(output="without", recipe="rtn", keys=qwt(gate="held_out", structure="affine"))
    monkeypatch.undo()
    plain = run_tiny(output="plain", recipe="rtn", keys={"weights.bits": 3})
    assert all(not block.compensation["kept"] and block.compensation["bytes"] == 0 for block in dropped.blocks)
    assert [block.relative_error for block in dropped.blocks] == [block.relative_error for block in plain.blocks]
    accounts = {name: ledger(tmp_path / name) for name in ("with", "without", "plain")}
    assert accounts["with"].bits["side"] > 0
    assert accounts["without"].bits["side"] == 0
    assert accounts["without"].file_bytes == accounts["plain"].file_bytes
    assert not Manifest.from_json(configured(tmp_path / "without")).compensations
    models = [transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("without", "plain")]
    ids = torch.arange(3, 23).view(1, 20)
    assert torch.equal(models[0](ids).logits, models[1](ids).logits)  # nearest, whatever the streams


def test_the_verdict_compares_both_networks_with_full_precision(run_tiny, tiny, tiny_text, tmp_path):
    report = run_tiny(recipe="rtn", keys={**qwt(target="trajectory", gate="held_out"), **MANY})
    assert report.blocks[-1].compensation["model"]["kept"] == 1
    run_tiny(output="plain", recipe="rtn", keys={"weights.bits": 2})
    ids = held_out_rows(tiny.save(tmp_path / "again", tiny.build()), tiny_text, 80)
    with torch.no_grad():
        wanted = tiny.build()(ids).logits.log_softmax(-1)
    for folder, name in (("out", "with"), ("plain", "without")):
        with torch.no_grad():
            given = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder)(ids).logits.log_softmax(-1)
        divergence = float((wanted.exp() * (wanted - given)).sum(-1).mean())
        assert report.blocks[-1].compensation["model"][name] == pytest.approx(divergence, rel=0.01)


def configured(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def test_every_byte_is_in_the_ledger(run_tiny, tmp_path):
    report = run_tiny(recipe="rtn", keys=qwt(structure="low_rank", rank=3))
    account = ledger(tmp_path / "out")
    said = sum(block.compensation["bytes"] for block in report.blocks)
    assert account.bits["side"] == 8 * said == 8 * 2 * (2 * 2 * 3 * 16 + 4 * 16)
    run_tiny(output="plain", recipe="rtn", keys={"weights.bits": 3})
    plain = ledger(tmp_path / "plain")
    assert account.parameters == plain.parameters
    weights = account.quantised_weights
    assert account.bits_per_weight == pytest.approx(plain.bits_per_weight + 8 * said / weights)
    assert report.bits["quantised_layers"] == account.bits_per_weight


def test_loads_in_other_types_and_saves_again(run_tiny, tmp_path):
    run_tiny(recipe="rtn", keys=qwt())
    ids = torch.arange(3, 23).view(1, 20)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    model.save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(model(ids).logits, again(ids).logits)
    half = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert half.model.layers[0].compensation.weight.dtype == torch.bfloat16
    assert half.model.layers[0].compensation.bias.dtype == torch.float32
    assert torch.allclose(half(ids).logits.float(), model(ids).logits, atol=0.1)
    inner = transformers.AutoModel.from_pretrained(tmp_path / "out")
    assert torch.allclose(inner(ids).last_hidden_state @ model.lm_head.weight.T, model(ids).logits, atol=1e-5)


def test_files_that_do_not_fit_are_refused(run_tiny, tmp_path):
    run_tiny(recipe="rtn", keys=qwt())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    about = config["quantization_config"]
    about["compensations"]["model.layers.0"]["inputs"] = about["compensations"]["model.layers.0"]["outputs"] = 8
    del about["seal"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="shape"):
        bitmend.load(tmp_path / "out")
    about["compensations"]["model.layers.7"] = about["compensations"].pop("model.layers.0")
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"model\.layers\.7"):
        bitmend.load(tmp_path / "out")


def test_requests_that_cannot_be(run_tiny, tmp_path, tiny_text):
    with pytest.raises(RecipeError, match="one compensator at most"):
        parse_recipe({"compensators": [{"name": "qwt"}, {"name": "qwt"}]})
    with pytest.raises(RecipeError, match="structure"):
        parse_recipe({"compensators": [{"name": "qwt", "structur": "full"}]})
    with pytest.raises(RequestError, match="calibration"):
        run_tiny(recipe="rtn", keys=qwt(), calibration=[])
    run_tiny(recipe="rtn", keys=qwt())
    with pytest.raises(RequestError, match="maps beside its blocks"):
        CompressedTensors().export(tmp_path / "out", tmp_path / "export")
    assert load_recipe("rtn", qwt()).needs_rows


def test_a_massive_token_counts_less(run_tiny, monkeypatch):
    weights = []

    def watch(self, x, y, errors, given=None, real=bitmend.linalg.least_squares.RegressionSums.add_):
        weights.append(given)
        return real(self, x, y, errors, given)

    monkeypatch.setattr(bitmend.linalg.least_squares.RegressionSums, "add_", watch)
    run_tiny(output="all", recipe="rtn", keys=qwt(token_cap=1e9))
    assert all(one is None for one in weights)
    weights.clear()
    run_tiny(output="capped", recipe="rtn", keys=qwt(token_cap=0.5))
    capped = torch.cat([one for one in weights if one is not None])
    assert float(capped.min()) < 0.6
    assert float(capped.max()) <= 1


class Blocky(nn.Module):
    pass


def block_of(*kinds, module=None, index=1):
    sites = tuple(LinearSite(f"b.{n}", str(n), kind, (4, 4)) for n, kind in enumerate(kinds))
    groups = tuple(SiteGroup(site.path, (site,), None) for site in sites)
    return Block("b", index, Blocky() if module is None else module, groups)


@pytest.mark.parametrize(
    ("kinds", "read", "made", "expected"),
    [
        (("linear",), (5, 8), (5, 8), (8, 8, False, 1)),
        (("linear",), (8, 4, 8), (8, 4, 8), (8, 8, False, 1)),  # features last on a map, as some models have them
        (("linear",), (16, 8), (4, 16), None),
        (("conv2d",), (4, 8, 8), (8, 4, 4), (4, 8, True, 2)),
        (("conv2d",), (4, 8, 8), (8, 8, 8), (4, 8, True, 1)),
        (("conv2d",), (4, 8, 8), (8, 4, 8), None),
        (("conv2d",), (4, 9, 9), (8, 5, 5), None),
        (("conv2d",), (4, 8, 8), (6, 8), None),
        ((), (5, 8), (5, 8), None),
    ],
)
def test_where_a_map_has_a_place(kinds, read, made, expected):
    found = place_of(block_of(*kinds), read, made, "tokens")
    place = found and (found.inputs, found.outputs, found.channels_first, found.stride)
    assert place == expected


def test_no_place_in_front_of_pictures_or_in_a_row_of_modules():
    assert place_of(block_of("linear", index=0), (5, 8), (5, 8), "pictures") is None
    assert place_of(block_of("linear", index=0), (5, 8), (5, 8), "tokens") is not None
    assert place_of(block_of("linear", module=nn.Sequential()), (5, 8), (5, 8), "tokens") is None
    assert issubclass(Compensation, nn.Module)


def test_what_stretches_a_token_is_no_error():
    given = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    lacking = torch.tensor([[6.0 + 4.0, 8.0 - 3.0], [1.0, 2.0]])  # twice the token, and (4, -3) across it
    assert torch.allclose(_across(lacking, given), torch.tensor([[4.0, -3.0], [1.0, 2.0]]))


def test_all_maps_go_unless_they_help_by_more_than_chance(run_tiny, monkeypatch, tmp_path):
    """Rows that gain and lose 1,000 nats in turn: the mean gain stays what it was, and is nothing beside its error."""
    calls = []

    def in_turn(self, wanted, given, mask, real=Compensating._distances):
        found = real(self, wanted, given, mask)
        calls.append(len(found))
        sign = 1 - 2.0 * (torch.arange(len(found)) % 2)
        return found + (1000.0 * sign if len(calls) % 2 else 0.0)  # each first call is of the rows without maps

    keys = {**qwt(target="trajectory", gate="held_out"), **MANY}
    assert run_tiny(output="sure", recipe="rtn", keys=keys).blocks[-1].compensation["model"]["kept"] == 1
    monkeypatch.setattr(Compensating, "_distances", in_turn)
    judged = run_tiny(output="unsure", recipe="rtn", keys=keys).blocks[-1].compensation["model"]
    assert all(rows % 2 == 0 for rows in calls)
    assert judged["with"] < judged["without"] < judged["with"] + judged["standard_error"]
    assert judged["kept"] == 0
    assert ledger(tmp_path / "unsure").bits["side"] == 0 < ledger(tmp_path / "sure").bits["side"]
