import errno
import json
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import transformers
from safetensors.torch import load_file

import bitmend
from bitmend.calibrate.data import load_calibration
from bitmend.errors import (
    CalibrationError,
    GuardError,
    ModelError,
    NumericsError,
    OutputError,
    QuantizationError,
    RecipeError,
    RequestError,
)
from bitmend.formats.manifest import Manifest
from bitmend.formats.native import read_site
from bitmend.pipeline import calibration_rows
from bitmend.pipeline import run as run_module
from bitmend.pipeline.recipe import Recipe, load_recipe
from bitmend.pipeline.run import (
    check_guard,
    check_request,
    choose_device,
    peak_memory_bytes,
    quantize,
    report_to_json,
    versions,
)
from bitmend.protocols import BlockReport, Event, RunReport, SiteReport
from bitmend.solvers.rtn import Rtn

IDS = torch.arange(3, 27).reshape(2, 12)


def dequantised(output, source_model):
    """Return the source model with the dequantised weights of `output` put in, and its QTensors."""
    config = json.loads((output / "config.json").read_text())
    manifest = Manifest.from_json(config["quantization_config"])
    tensors = load_file(output / "model.safetensors")
    qtensors = {name: read_site(tensors, name, entry) for name, entry in manifest.modules.items()}
    for name, qtensor in qtensors.items():
        module = source_model.get_submodule(name)
        weight = qtensor.dequantize(module.weight.dtype)
        with torch.no_grad():
            module.weight.copy_(weight.T if manifest.modules[name].kind == "conv1d" else weight)
    return source_model, qtensors


def snapshot(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------------------------ the folder
def test_an_output_folder_is_complete(run_tiny, tmp_path, tiny_model):
    report = run_tiny()
    output = tmp_path / "out"
    files = {path.name for path in output.iterdir()}
    expected = {"config.json", "model.safetensors", "run.json", "recipe.toml", "ledger.json", "generation_config.json"}
    expected |= {"README.md"}
    assert "import bitmend" in (tmp_path / "out" / "README.md").read_text()
    assert files == expected | {"tokenizer.json", "tokenizer_config.json"}
    assert (output / "tokenizer.json").read_bytes() == (tiny_model / "tokenizer.json").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"out"}  # no partial folder is left
    assert load_recipe(output / "recipe.toml").model_dump() == Recipe.model_validate(report.recipe).model_dump()
    assert json.loads((output / "ledger.json").read_text()) == bitmend.ledger(output).to_json()


def test_run_json_is_the_report(run_tiny, tmp_path):
    report = run_tiny()
    text = (tmp_path / "out" / "run.json").read_text()
    assert json.loads(text) == json.loads(json.dumps(report_to_json(report)))
    assert report.status == "done"
    assert report.output == str(tmp_path / "out")
    account = bitmend.ledger(tmp_path / "out")
    assert json.loads(text)["bits"] == {
        "quantised_layers": account.bits_per_weight,
        "whole_model": account.bits_per_weight_model,
    }
    assert account.bits_per_weight == 6.0  # 4 bits, a 16-bit scale for each 8 weights
    assert report.peak_memory_bytes > 50e6
    assert report.seconds["total"] > 0
    assert report.versions["torch"] == torch.__version__
    assert "NaN" not in text


def test_calibration_of_the_report_is_that_of_the_rows(run_tiny, tiny, tiny_text):
    report = run_tiny()
    rows = load_calibration([tiny_text], tiny.tokenizer(), sequences=8, sequence_length=12, held_out=0.25, seed=0)
    assert report.calibration == rows.summary()
    assert (report.calibration["sequences"], report.calibration["held_out"]) == (8, 2)


def test_provenance_lies_in_the_config(run_tiny, tmp_path):
    report = run_tiny()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["provenance"] == {
        "recipe": report.recipe,
        "versions": report.versions,
        "calibration": report.calibration,
    }


# ------------------------------------------------------------------------------------------------ the model
@pytest.mark.parametrize(
    ("family", "dtype", "changes"),
    [
        ("llama", torch.float32, {}),
        ("llama", torch.bfloat16, {}),
        ("llama-tied", torch.float32, {}),
        ("gpt2", torch.float32, {}),
        ("gpt2", torch.bfloat16, {"tie_word_embeddings": False}),
    ],
)
@pytest.mark.parametrize("keys", [{}, {"weights.bits": 3, "weights.symmetric": False}], ids=["w4", "w3a"])
def test_transformers_loads_what_was_solved(run_tiny, tmp_path, tiny, family, dtype, changes, keys):
    source = tiny.save(tmp_path / "source", tiny.build(family, dtype, **changes))
    run_tiny(model=source, keys=keys)
    output = tmp_path / "out"
    # In float32 whatever the file holds: bfloat16 activations differ by more than the tolerance may be.
    options = {"dtype": torch.float32}
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(output, output_loading_info=True, **options)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    reference, qtensors = dequantised(output, transformers.AutoModelForCausalLM.from_pretrained(source, **options))
    per_block = 4 if family == "gpt2" else 7
    assert len(qtensors) == 2 * per_block
    for name, qtensor in qtensors.items():
        assert torch.equal(loaded.get_submodule(name).packed.unpack().codes, qtensor.codes)
        assert qtensor.spec.scale_dtype == torch.bfloat16
    with torch.no_grad():
        found, expected = loaded(IDS).logits, reference(IDS).logits
        original = transformers.AutoModelForCausalLM.from_pretrained(source, **options)(IDS).logits
    scale = float(expected.abs().max())
    assert float((found - expected).abs().max()) <= 1e-5 * scale
    assert float((original - expected).abs().max()) > 1e-3 * scale
    assert transformers.AutoTokenizer.from_pretrained(output)("w3 w4")["input_ids"] == [3, 4]


def test_skipped_sites_and_all_else_stay_bit_exact_in_the_file(run_tiny, tmp_path, tiny):
    source = tiny.save(tmp_path / "source", tiny.build(dtype=torch.bfloat16))
    keys = {"overrides": [{"targets": ["re:.*o_proj", "model.layers.1.mlp.up_proj"], "skip": True}]}
    report = run_tiny(model=source, keys=keys)
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    kept = set(before) & set(after)
    assert {"model.layers.0.self_attn.o_proj.weight", "model.layers.1.mlp.up_proj.weight"} <= kept
    assert "model.layers.0.mlp.up_proj.weight" not in kept
    assert len(before) - len(kept) == 11 == sum(len(block.sites) for block in report.blocks)
    for name in kept:
        assert after[name].dtype == before[name].dtype
        assert torch.equal(after[name], before[name])


# ------------------------------------------------------------------------------------------------ repeatable
def test_the_same_seed_gives_the_same_bytes(run_tiny, tmp_path):
    reports = [run_tiny(output) for output in ("one", "other")]
    one, other = (snapshot(tmp_path / name) for name in ("one", "other"))
    assert set(one) == set(other)
    for name in set(one) - {"run.json"}:
        assert one[name] == other[name], name
    plain = [report_to_json(report) for report in reports]
    for report in plain:
        for key in ("seconds", "output", "peak_memory_bytes", "forecast"):
            del report[key]
        for block in report["blocks"]:
            del block["seconds"]
            for site in block["sites"]:
                del site["seconds"]
    assert plain[0] == plain[1]


def test_activations_on_disk_change_nothing_and_leave_nothing(run_tiny, tmp_path):
    for output, on_disk in (("memory", False), ("disk", True)):
        run_tiny(output, activations_on_disk=on_disk)
    memory, disk = (snapshot(tmp_path / name) for name in ("memory", "disk"))
    assert memory["model.safetensors"] == disk["model.safetensors"]
    assert {path.name for path in (tmp_path / "disk").rglob("*")} == set(memory)


def test_low_memory_changes_nothing_but_what_is_kept(run_tiny, tmp_path):
    reports = [run_tiny(output, low_memory=low) for output, low in (("kept", False), ("again", True))]
    kept, again = (snapshot(tmp_path / name) for name in ("kept", "again"))
    assert kept["model.safetensors"] == again["model.safetensors"]
    assert [report.forecast["wide_results_kept"] for report in reports] == [True, False]


def test_another_seed_draws_other_rows(run_tiny, tmp_path):
    one, other = run_tiny("one"), run_tiny("other", keys={"calibration.seed": 1})
    assert one.calibration["sha256"] != other.calibration["sha256"]
    files = [snapshot(tmp_path / name)["model.safetensors"] for name in ("one", "other")]
    assert files[0] != files[1]


# ------------------------------------------------------------------------------------------------ choices
def test_a_data_free_solver_needs_no_text(run_tiny, tmp_path):
    report = run_tiny(recipe="rtn", calibration=[])
    assert report.calibration == {}
    assert all(site.held_out_error is None for block in report.blocks for site in block.sites)
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_rows_drawn_before_are_taken_as_they_are(run_tiny, tmp_path, tiny, tiny_text):
    drawn = load_calibration([tiny_text], tiny.tokenizer(), sequences=8, sequence_length=12, held_out=0.25, seed=0)
    report, from_file = run_tiny("one", calibration=drawn, keys={"calibration.seed": 3}), run_tiny("other")
    assert report.calibration == from_file.calibration
    assert report.calibration["sha256"] == drawn.fingerprint
    one, other = (snapshot(tmp_path / name)["model.safetensors"] for name in ("one", "other"))
    assert one == other
    long = load_calibration([tiny_text], tiny.tokenizer(), sequences=2, sequence_length=65, held_out=0.5, seed=0)
    with pytest.raises(RequestError, match="sequence_length must be at most the model's context of 64 tokens; got 65"):
        run_tiny("third", calibration=long)


def test_nothing_held_out(run_tiny):
    report = run_tiny(keys={"calibration.held_out": 0.0})
    sites = [site for block in report.blocks for site in block.sites]
    assert all(site.held_out_error is None and site.fit_error > 0 and not site.refitted for site in sites)


def test_sequence_length_defaults_to_the_context(run_tiny):
    report = run_tiny(keys={"calibration.sequence_length": None})
    assert report.calibration["longest_sequence"] == 64


def test_the_output_is_named_after_model_and_recipe(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    keys = {"weights.group_size": 8}
    assert str(check_request(tiny_model, "rtn", [], overrides=keys)) == "tiny-rtn"
    quantize(tiny_model, "rtn", overrides=keys)
    assert (tmp_path / "tiny-rtn" / "config.json").exists()


def test_check_request_writes_nothing(tiny_model, tiny_text, tmp_path):
    keys = {"weights.group_size": 8, "calibration.sequences": 4}
    found = check_request(tiny_model, "gptq", [tiny_text], output=tmp_path / "out", overrides=keys)
    assert found == tmp_path / "out"
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(CalibrationError):
        check_request(tiny_model, "gptq", [tmp_path / "none.txt"], output=tmp_path / "out", overrides=keys)


def test_choose_device():
    assert choose_device("cpu") == torch.device("cpu")
    with pytest.raises(RequestError, match="device must be auto, cpu or cuda; got 'tpu'"):
        choose_device("tpu")


def test_cuda_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == torch.device("cpu")
    with pytest.raises(RequestError, match="this torch sees no CUDA device; use --device cpu"):
        choose_device("cuda")


def test_versions_and_memory(monkeypatch):
    assert set(versions()) == {
        "python",
        "machine",
        "bitmend",
        "torch",
        "scipy",
        "transformers",
        "safetensors",
        "tokenizers",
    }

    def missing(package):
        raise run_module.PackageNotFoundError

    monkeypatch.setattr(run_module, "version", missing)
    assert versions()["torch"] == "not installed"
    assert 20e6 < peak_memory_bytes() < 1e12


# ------------------------------------------------------------------------------------------------ refused at once
@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        (
            {"weights.group_size": 16},
            r"model\.layers\.0\.mlp\.down_proj: group_size must divide the width of the weight, .* "
            r"whose divisors are 1, 2, 3, 4, 6, 8, 12, 24",
        ),
        (
            {"overrides": [{"targets": ["model.layers.1.mlp.down_proj"], "group_size": 16}]},
            r"model\.layers\.1\.mlp\.down_proj: group_size must divide",
        ),
        (
            {"overrides": [{"targets": ["model.layers.0.mlp.dwn_proj"], "bits": 3}]},
            r"the override for \['model\.layers\.0\.mlp\.dwn_proj'\] matches no site of the model; "
            r"did you mean 'model\.layers\.0\.mlp\.down_proj'\?",
        ),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused_before_anything_runs(run_tiny, tmp_path, monkeypatch, keys, sentence):
    monkeypatch.setattr(calibration_rows, "load_calibration", None)  # would fail if it were reached
    with pytest.raises(RecipeError, match=sentence):
        run_tiny(keys=keys)
    assert list(tmp_path.iterdir()) == []


def test_a_group_size_that_fits_after_an_override(run_tiny):
    keys = {"weights.group_size": 16, "overrides": [{"targets": ["re:.*down_proj"], "group_size": 24}]}
    report = run_tiny(recipe="rtn", keys=keys)
    assert {site.spec for site in report.blocks[0].sites} == {"4 bit symmetric g16", "4 bit symmetric g24"}


def test_a_request_that_cannot_be(run_tiny, tmp_path, tiny_model):
    with pytest.raises(
        RequestError, match="the recipe 'gptq' needs calibration data, but none came; pass --calibration"
    ):
        run_tiny(calibration=[])
    with pytest.raises(RequestError, match="sequence_length must be at most the model's context of 64 tokens; got 65"):
        run_tiny(keys={"calibration.sequence_length": 65})
    with pytest.raises(RequestError, match="overrides go with the name of a recipe; change the Recipe object itself"):
        run_tiny(recipe=Recipe())
    with pytest.raises(ModelError, match=r"the model folder .* does not exist"):
        run_tiny(model=tmp_path / "none")
    (tmp_path / "out").mkdir()
    with pytest.raises(
        RequestError, match=r"out exists; choose another output, pass --resume to go on with it, or --overwrite"
    ):
        run_tiny()
    assert list((tmp_path / "out").iterdir()) == []


def test_the_source_folder_is_never_the_output(run_tiny, tmp_path, tiny):
    source = tiny.save(tmp_path / "source", tiny.build())
    before = snapshot(source)
    for output in ("source", "source/inside"):
        with pytest.raises(RequestError, match="must lie outside the model folder"):
            run_tiny(output, model=source, recipe="rtn", overwrite=True)
    assert snapshot(source) == before


# ------------------------------------------------------------------------------------------------ failed on the way
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("weight", "sentence"),
    [
        ("model.layers.1.mlp.up_proj", r"the weight of model\.layers\.1\.mlp\.up_proj must be finite, but 1 of its"),
        ("model.embed_tokens", r"the tensor model\.embed_tokens\.weight must be finite, but holds NaN or Inf"),
        ("model.norm", r"the tensor model\.norm\.weight must be finite"),
        ("lm_head", r"the tensor lm_head\.weight must be finite"),
    ],
)
@pytest.mark.parametrize("recipe", ["rtn", "gptq"])
def test_bad_weights_are_named_and_nothing_is_left(run_tiny, tmp_path, tiny, weight, sentence, value, recipe):
    model = tiny.build()
    with torch.no_grad():
        model.get_submodule(weight).weight.view(-1)[5] = value
    source = tiny.save(tmp_path / "source", model)
    with pytest.raises(NumericsError, match=sentence):
        run_tiny(model=source, recipe=recipe)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@dataclass(frozen=True)
class Fails:
    """Rounds to nearest until it comes to `path`."""

    needs: ClassVar[frozenset] = frozenset()
    kind: ClassVar[type[BaseException]] = KeyboardInterrupt

    def solve(self, problem):
        if problem.site.name == "model.layers.1.mlp.up_proj":
            raise self.kind("now")
        return Rtn().solve(problem)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError, OutputError, QuantizationError])
def test_a_failed_run_keeps_only_what_may_be_gone_on_with(run_tiny, tmp_path, add_part, kind):
    """What the request itself makes fail would fail again."""
    run_tiny(recipe="rtn")
    before = snapshot(tmp_path / "out")
    add_part.solver("fails", type("Fails", (Fails,), {"kind": kind}))
    for output in ("out", "new"):
        with pytest.raises(kind, match="now") as caught:
            run_tiny(output, recipe="fails", overwrite=True, activations_on_disk=True)
    left = {path.name for path in tmp_path.iterdir()}
    if kind is QuantizationError:
        assert left == {"out"}
    else:
        assert left == {"out", "out.partial", "new.partial"}
        assert {path.name for path in (tmp_path / "new.partial").iterdir()} == {"journal", "parts"}
        assert caught.value.__notes__ == [
            f"1 finished blocks and 4 finished matrices of the next one are kept in {tmp_path / 'new.partial'}; "
            "the same command with --resume goes on"
        ]
    assert snapshot(tmp_path / "out") == before


def test_overwrite_replaces_at_the_end(run_tiny, tmp_path):
    run_tiny(recipe="rtn")
    before = snapshot(tmp_path / "out")
    run_tiny(recipe="rtn", keys={"weights.bits": 2}, overwrite=True)
    after = snapshot(tmp_path / "out")
    assert len(after["model.safetensors"]) < len(before["model.safetensors"])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("when", "left"),
    [
        ("pipeline.resume.write_json", ["out"]),
        ("pipeline.resume.write_record", ["out"]),
        ("formats.writer.write_record", ["out", "out.partial"]),
        ("formats.writer.write_hashed", ["out", "out.partial"]),
    ],
)
def test_a_full_disk_leaves_the_old_output(run_tiny, tmp_path, monkeypatch, when, left):
    run_tiny(recipe="rtn")
    before = snapshot(tmp_path / "out")
    calls = []

    def full(*arguments):
        calls.append(arguments)
        raise OSError(errno.ENOSPC, "No space left on device")

    keys = {"weights.bits": 2}
    with monkeypatch.context() as patch:
        patch.setattr(f"bitmend.{when}", full)
        with pytest.raises(OutputError, match=r"the disk of .*out is full; free some space and run again"):
            run_tiny(recipe="rtn", keys=keys, overwrite=True)
    assert len(calls) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == left
    assert snapshot(tmp_path / "out") == before
    if len(left) == 2:  # the run that had leave to replace the old output still has it
        run_tiny(recipe="rtn", keys=keys, resume=True)
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        assert snapshot(tmp_path / "out")["model.safetensors"] != before["model.safetensors"]


def test_a_full_disk_under_the_activations(run_tiny, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    class FullDisk:
        """torch, as the store of activations alone sees it."""

        split = staticmethod(full)

        def __getattr__(self, name):
            return getattr(torch, name)

    monkeypatch.setattr("bitmend.calibrate.activation_store.torch", FullDisk())
    with pytest.raises(OutputError, match=r"activation store: .*No space left on device"):
        run_tiny(activations_on_disk=True)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------ the guard
def report_of(sites, events):
    blocks = [BlockReport("b", sites=[SiteReport(f"s{number}", "w4", "rtn") for number in range(sites)])]
    return RunReport("m", {}, {}, {}, blocks=blocks, events=events, output="there")


def degrading(kind="fallback"):
    return Event(kind, "here", "it fell back", True)


def test_up_to_one_site_in_twenty_may_degrade():
    check_guard(report_of(20, [degrading()]))
    check_guard(report_of(20, [degrading(), *(Event("dropped", "s", "no better") for _ in range(20))]))
    check_guard(report_of(0, []))


def test_more_break_the_guard():
    sentence = (
        r"2 of 39 sites did not get what was asked for \(first: here: it fell back\); "
        r"there is complete and its run\.json names them all"
    )
    check_guard(report_of(40, [degrading()] * 2))
    with pytest.raises(GuardError, match=f"^{sentence}$") as caught:
        check_guard(report_of(39, [degrading()] * 2))
    assert caught.value.exit_code == 1


def test_layers_that_never_ran_count_as_sites():
    check_guard(report_of(19, [degrading("unread")]))
    with pytest.raises(GuardError, match="1 of 19 sites"):
        check_guard(report_of(18, [degrading("unread")]))


# ------------------------------------------------------------------------------------------------ the report as JSON
def test_numbers_that_are_not_finite_become_null():
    report = report_of(1, [degrading()])
    report.blocks[0].sites[0].diagnostics = {"a": float("nan"), "b": [1.0, float("inf")], "c": (2, "x")}
    plain = report_to_json(report)
    assert plain["blocks"][0]["sites"][0]["diagnostics"] == {"a": None, "b": [1.0, None], "c": [2, "x"]}
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["events"][0] == {"kind": "fallback", "where": "here", "message": "it fell back", "degrades": True}


@pytest.mark.parametrize("context", [{"a": 1}, "x", 0, -3, None])
def test_a_context_that_is_no_number_of_tokens_is_not_one(tiny_model, tiny_text, context):
    from bitmend.models.hf_causal_lm import HfCausalLm
    from bitmend.pipeline.calibration_rows import draw_calibration
    from bitmend.pipeline.recipe import load_recipe
    from bitmend.protocols import SilentProgress

    adapter = HfCausalLm.open(tiny_model)
    adapter.model.config.__dict__["max_position_embeddings"] = context
    plan = load_recipe("gptq", {"calibration.sequences": 4, "calibration.sequence_length": 12})
    assert len(draw_calibration(plan, adapter, [tiny_text], SilentProgress())) == 4
