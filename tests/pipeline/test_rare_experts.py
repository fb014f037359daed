"""The refusal before a run, and whole runs over mixtures of experts."""

import json

import pytest
import torch
import transformers

from bitmend.errors import CalibrationError, ModelError, RecipeError
from bitmend.formats.ledger import ledger
from bitmend.models.experts import PackedForm
from bitmend.models.hf_causal_lm import HfCausalLm
from bitmend.pipeline import quantize as loop
from bitmend.pipeline.run import check_guard
from bitmend.protocols import SilentProgress, TokenBatch

IDS = torch.randint(3, 61, (2, 12), generator=torch.Generator().manual_seed(7))


def never(model):
    """Of expert 0 and 1 the logits are opposite, of 2 and 3 zero: one choice a token never falls on these."""
    for layer in model.model.layers:
        layer.mlp.gate.weight[0] = torch.randn(16, generator=torch.Generator().manual_seed(1))
        layer.mlp.gate.weight[1] = -layer.mlp.gate.weight[0]
        layer.mlp.gate.weight[2:] = 0


@pytest.fixture
def source(tiny, tmp_path):
    """Return a function that saves a tiny mixture of experts."""

    def save(family="qwen3-moe", change=None, **keys):
        model = tiny.build(family, **keys)
        if change is not None:
            with torch.no_grad():
                change(model)
        return tiny.save(tmp_path / "source", model)

    return save


@pytest.fixture
def lonely(source):
    """A model of which two of four experts are never chosen."""
    return source(change=never, num_experts_per_tok=1)


def sites_of(report):
    return [site for block in report.blocks for site in block.sites]


def numbers(value):
    if isinstance(value, dict):
        return [number for item in value.values() for number in numbers(item)]
    if isinstance(value, list):
        return [number for item in value for number in numbers(item)]
    return [value] if isinstance(value, float) else []


def logits(folder, **options):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values())
    with torch.no_grad():
        return model(IDS).logits


# ------------------------------------------------------------------------------------------------ whole runs
# Every solver once, every family once.
PAIRS = [
    ("rtn", "olmoe"),
    ("gptq", "mixtral"),
    ("gptaq", "qwen3-moe"),
    ("marr", "qwen2-moe"),
    ("descent", "granite-moe"),
]


QUICK = [("gptq", "mixtral"), ("marr", "qwen2-moe")]


@pytest.mark.parametrize(
    ("recipe", "family"),
    [
        pytest.param(*pair, marks=[] if pair in QUICK else pytest.mark.slow)
        for pair in (*PAIRS, ("marr", "gpt-oss"), ("marr", "mixtral"))
    ],
)
def test_every_solver_and_family(tiny, source, run_tiny, tmp_path, recipe, family):
    folder = source(family)
    report = run_tiny("out", model=folder, recipe=recipe)
    # Query, key, value and output; three for each of four experts, and for a shared one.
    assert [len(block.sites) for block in report.blocks] == [4 + 12 + 3 * (family == "qwen2-moe")] * 2
    assert {event.kind for event in report.events} <= {"dropped", "pooled_expert"}
    account = ledger(tmp_path / "out")
    assert sum(account.bits.values()) == 8 * account.file_bytes
    assert report.bits["quantised_layers"] == 4 + 16 / 8  # a scale of 16 bits for every 8 weights
    dense = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert account.parameters == sum(weight.numel() for weight in dense.parameters())
    with torch.no_grad():
        expected = dense(IDS).logits
    assert 0 < (logits(tmp_path / "out") - expected).square().mean() < 0.2 * expected.square().mean()


def test_the_saved_model_is_the_network_that_the_run_saw(source, run_tiny, tmp_path):
    """Its blocks, one by one, give the outputs that the quantised stream had."""
    folder = source("mixtral")
    report = run_tiny("out", model=folder, recipe="gptq")
    adapter = HfCausalLm.open(folder)
    quantised = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for index in range(2):
        adapter.load_block(index)
    for site in sites_of(report):
        weight = quantised.get_submodule(site.name).dequantize()
        adapter.model.get_submodule(site.name).weight.data.copy_(weight)
    with torch.no_grad():
        assert torch.equal(adapter.model(IDS).logits, logits(tmp_path / "out"))


def test_tokens_of_experts_are_in_the_report(source, run_tiny, tmp_path):
    run_tiny("out", model=source("mixtral"), recipe="marr")
    blocks = json.loads((tmp_path / "out" / "run.json").read_text())["blocks"]
    for block in blocks:
        tokens = {
            site["name"].rpartition(".")[0]: (
                site["diagnostics"]["expert_tokens_fit"],
                site["diagnostics"]["expert_tokens_held_out"],
            )
            for site in block["sites"]
            if site["name"].endswith(".w1")
        }
        assert len(tokens) == 4
        assert sum(fit for fit, _ in tokens.values()) == 2 * 6 * 12  # two experts a token, six rows of twelve
        assert sum(held_out for _, held_out in tokens.values()) == 2 * 2 * 12
        assert not [
            site for site in block["sites"] if "q_proj" in site["name"] and "expert_tokens_fit" in site["diagnostics"]
        ]


def test_routers_stay_as_they_are(source, run_tiny, tmp_path):
    folder = source("qwen2-moe")
    run_tiny("out", model=folder, recipe="rtn")
    before = transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()
    after = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name in ("model.layers.1.mlp.gate.weight", "model.layers.1.mlp.shared_expert_gate.weight"):
        assert torch.equal(before[name], after[name])
    assert "model.layers.1.mlp.shared_expert.up_proj.weight_packed" in after


@pytest.mark.parametrize("recipe", ["gptq", "marr"])
@pytest.mark.parametrize("choice", ["pool", "rtn", None])
def test_experts_that_no_token_reaches(lonely, run_tiny, tmp_path, recipe, choice):
    keys = {"calibration.min_tokens_per_expert": 1}
    if choice is not None:
        keys["calibration.rare_experts"] = choice
    report = run_tiny("out", model=lonely, recipe=recipe, keys=keys)
    rare = [site for site in sites_of(report) if ".experts.2." in site.name or ".experts.3." in site.name]
    assert len(rare) == 2 * 2 * 3
    assert all(site.diagnostics["expert_tokens_fit"] == 0 for site in rare)
    kind = "rare_expert" if choice == "rtn" else "pooled_expert"
    told = [event for event in report.events if event.kind == kind]
    assert {event.where for event in told} == {site.name for site in rare}
    assert all(event.degrades == (choice == "rtn") for event in told)
    for site in rare:
        if choice == "rtn":
            assert site.solver == "rtn"
            assert site.held_out_error is None
        else:
            assert 0 <= site.held_out_error < 1
    text = (tmp_path / "out" / "run.json").read_text()
    assert "NaN" not in text
    assert all(number == number for number in numbers(json.loads(text)))
    assert logits(tmp_path / "out").isfinite().all()
    if choice == "rtn":
        with pytest.raises(Exception, match="12 of 32 sites did not get what was asked for"):
            check_guard(report)


def test_without_held_out_rows(lonely, run_tiny):
    report = run_tiny("out", model=lonely, keys={"calibration.held_out": 0.0, "calibration.min_tokens_per_expert": 1})
    assert all(site.held_out_error is None for site in sites_of(report))
    assert {site.diagnostics.get("expert_tokens_held_out", 0) for site in sites_of(report)} == {0, None}


# ------------------------------------------------------------------------------------------------ refused
KEYS = {"calibration.rare_experts": "refuse", "calibration.min_tokens_per_expert": 1}


def test_a_refusal_comes_before_anything_is_solved(lonely, run_tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "DualStream", None)  # would fail if the run itself began
    with pytest.raises(
        CalibrationError,
        match=r"model\.layers\.0\.mlp\.experts\.2: 0 calibration tokens of the fit split reach this expert",
    ):
        run_tiny("out", model=lonely, keys=KEYS)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_enough_tokens_are_not_refused_and_change_no_code(source, run_tiny, tmp_path):
    folder = source()
    many = {"calibration.sequences": 32, "calibration.min_tokens_per_expert": 1}
    run_tiny("out", model=folder, keys=KEYS | many)
    run_tiny("plain", model=folder, keys=many)
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "plain"))
    assert one == other


def test_experts_that_are_skipped_or_not_measured_are_not_refused(lonely, run_tiny):
    run_tiny(
        "skipped", model=lonely, keys={**KEYS, "overrides": [{"targets": [r"re:.*experts\.[23]\."], "skip": True}]}
    )
    run_tiny("rtn", model=lonely, recipe="rtn", keys=KEYS)


def test_a_shortage_that_only_the_quantised_network_has_is_refused_on_the_way(source, run_tiny, monkeypatch):
    monkeypatch.setattr(loop, "refuse_rare_experts", lambda *given, **options: None)
    with pytest.raises(CalibrationError, match="of the fit split reach this expert, but 1000 are required"):
        run_tiny("out", model=source(), keys={**KEYS, "calibration.min_tokens_per_expert": 1000})


def test_held_out_tokens_are_counted_too(lonely):
    adapter = HfCausalLm.open(lonely)
    from bitmend.pipeline.rare_experts import refuse_rare_experts
    from bitmend.routing import RareExperts

    batches = [(TokenBatch(IDS), False), (TokenBatch(IDS[:1, :1]), True)]
    with pytest.raises(CalibrationError, match=r"experts\.\d: (0|no) calibration token"):
        refuse_rare_experts(
            adapter,
            batches,
            RareExperts("refuse", 1),
            lambda site: ".experts.0." in site.name or ".experts.1." in site.name,
            SilentProgress(),
            device=torch.device("cpu"),
            directory=None,
            trace=adapter.few_rows(),
        )


def test_experts_of_an_unknown_form_are_refused_before_anything_runs(source, run_tiny, tmp_path, monkeypatch):
    folder = source()
    monkeypatch.setattr(PackedForm, "of", classmethod(lambda cls, module: None))
    with pytest.raises(ModelError, match=r"(gate_up_proj|packs its experts)"):
        run_tiny("out", model=folder)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------ blocks of two kinds
def test_blocks_of_two_kinds(source, run_tiny):
    folder = source(mlp_only_layers=[0], intermediate_size=16)
    skip = {"overrides": [{"targets": [r"re:.*experts\.1\."], "skip": True}]}
    report = run_tiny("out", model=folder, keys=skip)
    assert [len(block.sites) for block in report.blocks] == [7, 4 + 9]
    with pytest.raises(RecipeError, match=r"model\.layers\.1\.mlp\.experts\.0\.down_proj: .*8"):
        run_tiny("other", model=folder, keys={"weights.group_size": 16})
