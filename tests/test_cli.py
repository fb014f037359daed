"""The command line as a user meets it: exit code, one sentence on standard error, nothing lost."""

import errno
import importlib.util
import json
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from bitmend import cli
from bitmend.protocols import Event
from bitmend.solvers.rtn import Rtn

HAS_COMPRESSED_TENSORS = importlib.util.find_spec("compressed_tensors") is not None


@dataclass
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture
def bitmend(monkeypatch, capsys, tmp_path):
    """Run the command line in this process, inside an empty folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("BITMEND_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cli, "_be_quiet_about_libraries", lambda: None)

    def run(*arguments):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["bitmend", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return Outcome(stop.value.code, captured.out, captured.err)

    return run


@pytest.fixture
def refused(bitmend):
    """Run the command line and return its one sentence on standard error."""

    def run(*arguments, code=2):
        outcome = bitmend(*arguments)
        assert outcome.code == code, outcome
        assert outcome.out == ""
        lines = outcome.err.splitlines()
        assert len(lines) == 1, outcome.err
        assert lines[0].startswith("error: ")
        assert "Traceback" not in outcome.err
        return lines[0].removeprefix("error: ")

    return run


@pytest.fixture
def quantise(tiny_model, tiny_text):
    """Return the arguments of a run that works; later options win over earlier ones."""

    def arguments(*more, model=None, output="out", text=tiny_text):
        fixed = ["--sequences", "8", "--sequence-length", "12", "--group-size", "8", "--quiet"]
        fixed += ["--set", "weights.observer=minmax"]
        return ["quantize", model or tiny_model, "--calibration", text, "--output", output, *fixed, *more]

    return arguments


@pytest.fixture(scope="module")
def quantised(tiny_model, tmp_path_factory):
    """A finished output; read only."""
    from bitmend.pipeline.run import quantize

    folder = tmp_path_factory.mktemp("quantised") / "model"
    quantize(tiny_model, "rtn", output=folder, overrides={"weights.group_size": 8})
    return folder


@pytest.fixture
def copy_of(tmp_path):
    """Return a function that copies a folder, to be damaged."""

    def copy(folder):
        target = tmp_path / "damaged"
        target.mkdir()
        for file in folder.iterdir():
            (target / file.name).write_bytes(file.read_bytes())
        return target

    return copy


def snapshot(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def names_here():
    return sorted(path.name for path in Path().iterdir())


def nothing_here():
    return names_here() == []


# ------------------------------------------------------------------------------------------------ what works
def test_quantize(bitmend, quantise):
    outcome = bitmend(*quantise("--log-json", "log.json"))
    assert (outcome.code, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    assert lines[-2].startswith("14 matrices quantised; 6.000 bits per weight in them, ")
    assert lines[-1].startswith("wrote ")
    assert "of 14 candidates kept" in lines[-3]
    assert json.loads(Path("log.json").read_text()) == json.loads(Path("out/run.json").read_text())


def test_progress_goes_to_standard_error(bitmend, quantise):
    outcome = bitmend(*(argument for argument in quantise() if argument != "--quiet"))
    assert outcome.code == 0
    assert "calibration: 8 sequences, 96 tokens, 2 sequences held out, sha256 " in outcome.err
    assert "quantising blocks: 2 of 2 in " in outcome.err
    assert "quantising" not in outcome.out


def test_keys_of_the_command_line_reach_the_recipe(bitmend, quantise):
    options = ["--bits", "3", "--seed", "5", "--set", "solver.damping=0.05", "--set", "weights.symmetric=false"]
    assert bitmend(*quantise(*options, "--device", "cpu")).code == 0
    recipe = json.loads(Path("out/run.json").read_text())["recipe"]
    assert recipe["weights"]["bits"] == 3
    assert recipe["weights"]["symmetric"] is False
    assert recipe["solver"] == {"name": "gptq", "damping": 0.05}
    assert recipe["calibration"]["seed"] == 5


def test_a_key_is_set_once(refused, quantise):
    sentence = refused(*quantise("--bits", "3", "--set", "weights.bits=2", "--recipe", "rtn"))
    assert "weights.bits is set twice, by --set to 2 and by its own option to 3; keep one" in sentence


def test_a_recipe_file(bitmend, quantise, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('[weights]\nbits = 2\n[solver]\nname = "rtn"\n')
    assert bitmend(*quantise("--recipe", path)).code == 0
    assert json.loads(Path("out/run.json").read_text())["recipe"]["name"] == "mine"
    assert bitmend(*quantise("--recipe", "out/recipe.toml", output="again")).code == 0
    assert Path("out/model.safetensors").read_bytes() == Path("again/model.safetensors").read_bytes()


def test_dry_run_shows_the_recipe_and_writes_nothing(bitmend, quantise, tmp_path):
    outcome = bitmend(*quantise("--dry-run", "--bits", "3"))
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith("# would write out\n")
    assert nothing_here()
    (tmp_path / "shown.toml").write_text(outcome.out)
    again = bitmend(*quantise("--dry-run", "--recipe", tmp_path / "shown.toml"))
    assert again.out == outcome.out


def test_dry_run_checks_the_calibration_too(refused, quantise):
    assert "none.txt" in refused(*quantise("--dry-run", text="none.txt"))


def test_evaluate(bitmend, quantised, tiny_model, tiny_text):
    options = ["--text", tiny_text, "--window-length", "16", "--windows", "3", "--quiet"]
    outcome = bitmend("evaluate", tiny_model, quantised, "--reference", tiny_model, *options, "--json", "result.json")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.splitlines()[0].split("\t") == [
        "model", "text", "windows", "perplexity", "KL (nats)", "+-", "top-1 agreement",
    ]  # fmt: skip
    content = json.loads(Path("result.json").read_text())
    assert [model["model"] for model in content["models"]] == [str(tiny_model), str(quantised)]
    for model in content["models"]:
        (text,) = model["texts"]
        assert text["file"] == str(tiny_text)
        assert (text["windows"], text["window_length"]) == (3, 16)
        assert text["perplexity"] > 1
    same, changed = (model["texts"][0] for model in content["models"])
    assert (same["kl"], same["top1_agreement"]) == (pytest.approx(0, abs=1e-6), 1.0)
    assert changed["kl"] > 1e-4


def test_evaluate_all_windows(bitmend, tiny_model, tiny_text):
    options = ["--text", tiny_text, "--window-length", "16", "--windows", "0", "--quiet", "--json", "all.json"]
    assert bitmend("evaluate", tiny_model, *options).code == 0
    (text,) = json.loads(Path("all.json").read_text())["models"][0]["texts"]
    assert text["windows"] == 125
    assert text["kl"] is None


def test_inspect(bitmend, quantised):
    outcome = bitmend("inspect", quantised, "--json", "ledger.json")
    assert (outcome.code, outcome.err) == (0, "")
    assert json.loads(Path("ledger.json").read_text()) == json.loads((quantised / "ledger.json").read_text())
    assert "bits per weight, quantised layers\t6.0000\t" in outcome.out
    assert "4 bits\t14\t3,840\t6.0000" in outcome.out


def test_inspect_a_plain_model(bitmend, tiny_model):
    outcome = bitmend("inspect", tiny_model)
    assert outcome.code == 0
    assert "bits per weight, whole model\t32.0000\t" in outcome.out
    assert "schemes" not in outcome.out


def test_generate(bitmend, quantised):
    outcomes = [bitmend("generate", quantised, "--prompt", "w3 w4", "--tokens", "5") for _ in range(2)]
    assert outcomes[0].code == 0
    assert outcomes[0].out.startswith("w3 w4 w")
    assert outcomes[0].out == outcomes[1].out
    assert len(outcomes[0].out.split()) <= 7


@pytest.mark.parametrize("kind", [None, *cli.Listing])
def test_list(bitmend, kind):
    outcome = bitmend("list", *([] if kind is None else [kind.value]))
    assert (outcome.code, outcome.err) == (0, "")
    titles = [line for line in outcome.out.splitlines() if line in list(cli.Listing)]
    assert titles == ([kind.value] if kind else [member.value for member in cli.Listing])
    assert outcome.out.count("name\twhat it does\tsource") == len(titles)


def test_list_names_the_solvers(bitmend):
    assert "\ngptq\tSecond-order rounding" in bitmend("list", "solvers").out


@pytest.mark.skipif(not HAS_COMPRESSED_TENSORS, reason="needs the extra `export`")
def test_export_with_and_without_overwrite(bitmend, refused, tiny, tmp_path, monkeypatch):
    # What the comparison finds is for tests/formats; here it would start another process each time.
    monkeypatch.setattr("bitmend.formats.compressed_tensors.compare_logits", lambda *arguments: None)
    source = tiny.save(tmp_path / "source", tiny.build(dtype=torch.bfloat16))
    assert bitmend("quantize", source, "--recipe", "rtn", "--group-size", "8", "--output", "native").code == 0
    outcome = bitmend("export", "native", "--format", "compressed-tensors", "--output", "exported")
    assert outcome.code == 0, outcome.err
    assert outcome.out.strip() == "wrote exported; read back with its own reader, logits agree"
    config = json.loads(Path("exported/config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    arguments = ["export", "native", "--format", "compressed-tensors", "--output", "exported"]
    assert "exported exists" in refused(*arguments)
    assert bitmend(*arguments, "--overwrite").code == 0


def test_export_to_gptq_and_inspect_it(bitmend, refused, tiny, tmp_path):
    source = tiny.save(tmp_path / "source", tiny.build(dtype=torch.bfloat16))
    assert bitmend("quantize", source, "--recipe", "rtn", "--group-size", "8", "--output", "native").code == 0
    arguments = ["export", "native", "--format", "gptq", "--output", "exported"]
    outcome = bitmend(*arguments)
    assert outcome.code == 0, outcome.err
    assert outcome.out.strip() == "wrote exported; read back from the disk, weights agree bit for bit"
    assert "group size: GPTQModel 7.6 reads groups of" in outcome.err
    assert json.loads(Path("exported/quantize_config.json").read_text())["checkpoint_format"] == "gptq"
    assert "exported exists" in refused(*arguments)
    assert bitmend(*arguments, "--overwrite").code == 0
    outcome = bitmend("inspect", "exported")
    assert outcome.code == 0
    assert "exported (gptq)" in outcome.out
    assert "4 bits\t14\t" in outcome.out


def test_help_names_every_command(bitmend):
    outcome = bitmend("--help")
    assert (outcome.code, outcome.err) == (0, "")
    for command in ("quantize", "evaluate", "inspect", "generate", "export", "list", "demo"):
        assert f" {command} " in outcome.out


def test_libraries_are_told_to_be_quiet():
    before = transformers.logging.get_verbosity()
    try:
        transformers.logging.set_verbosity_info()
        cli._be_quiet_about_libraries()
        assert transformers.logging.get_verbosity() == transformers.logging.ERROR
    finally:
        transformers.logging.set_verbosity(before)


# ------------------------------------------------------------------------------------------------ models
def test_a_missing_model(refused, quantise):
    sentence = refused(*quantise(model="./nowhere"))
    assert sentence == "the model folder ./nowhere does not exist; give an existing folder or a hub name like org/name"
    assert nothing_here()


def test_a_hub_name_that_cannot_be_fetched(refused, quantise, monkeypatch):
    def fail(*arguments, **options):
        raise OSError("no\nnetwork")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    sentence = refused(*quantise(model="org/name"))
    assert "org/name is no local folder and could not be fetched from the hub (no network)" in sentence


@pytest.mark.parametrize("command", ["quantize", "evaluate", "inspect", "generate", "export"])
def test_a_folder_without_config(refused, quantise, tiny_text, tmp_path, command):
    folder = tmp_path / "empty"
    folder.mkdir()
    more = {
        "quantize": quantise(model=folder)[2:],
        "evaluate": ["--text", tiny_text],
        "inspect": [],
        "generate": ["--prompt", "w3"],
        "export": ["--format", "compressed-tensors", "--output", "exported"],
    }
    if command == "export" and not HAS_COMPRESSED_TENSORS:
        pytest.skip("needs the extra `export`")
    sentence = refused(command, folder, *more[command])
    assert str(folder) in sentence
    assert "config.json" in sentence
    assert nothing_here()


@pytest.mark.parametrize(
    ("config", "why", "modules"),
    [
        (
            transformers.T5Config(
                architectures=["T5ForConditionalGeneration"], d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=2,
                vocab_size=32,
            ),
            "it is an encoder-decoder model",
            "encoder.block (2 x T5Block)",
        ),
        (
            transformers.BertConfig(
                architectures=["BertForMaskedLM"], hidden_size=16, num_hidden_layers=2,
                num_attention_heads=2, intermediate_size=16,
            ),
            "it is no text encoder",
            "2 x BertLayer",
        ),
    ],
    ids=["t5", "bert"],
)  # fmt: skip
def test_an_architecture_that_is_not_read_names_its_modules(refused, quantise, tmp_path, config, why, modules):
    config.save_pretrained(tmp_path / "model")
    sentence = refused(*quantise(model=tmp_path / "model"))
    assert config.architectures[0] in sentence
    assert why in sentence
    assert modules in sentence
    assert nothing_here()


def test_a_model_that_is_quantised_already(refused, quantise, quantised):
    assert "is quantised already (quant_method 'bitmend')" in refused(*quantise(model=quantised))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_weights(refused, quantise, tiny, tmp_path, value):
    model = tiny.build()
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[0, 3] = value
    source = tiny.save(tmp_path / "source", model)
    sentence = refused(*quantise(model=source), code=1)
    assert (
        "the weight of model.layers.1.self_attn.v_proj must be finite, but 1 of its entries are NaN or Inf" in sentence
    )
    assert nothing_here()


# ------------------------------------------------------------------------------------------------ recipes
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--bits", "0"], "weights.bits: input should be greater than or equal to 1; got 0"),
        (["--bits", "9"], "weights.bits: input should be less than or equal to 8; got 9"),
        (["--bits", "-1"], "weights.bits: input should be greater than or equal to 1; got -1"),
        (["--group-size", "7"], "model.layers.0.self_attn.q_proj: group_size must divide the width"),
        (["--group-size", "0"], "group_size must be a positive number of columns, or -1"),
        (["--set", "weights.bist=3"], "unknown key 'weights.bist'; did you mean 'bits'?"),
        (["--set", "solver.dampening=3"], "solver 'gptq' has no key 'dampening'; did you mean 'damping'?"),
        (["--set", "solver.damping"], "--set must look like solver.damping=0.05; got 'solver.damping'"),
        (["--set", "overrides.0.bits=3"], "overrides"),
        (["--recipe", "gtpq"], "no recipe is called 'gtpq'; did you mean 'gptq'?"),
        (["--recipe", "none.toml"], "the recipe file none.toml does not exist"),
        (["--set", "head.bits=99"], "head.bits: input should be less than or equal to 8; got 99"),
        (["--sequences", "0"], "calibration.sequences: input should be greater than or equal to 1; got 0"),
        (["--sequence-length", "999"], "sequence_length must be at most the model's context of 64 tokens; got 999"),
    ],
)
def test_a_recipe_that_cannot_be(refused, quantise, options, expected):
    assert expected in refused(*quantise(*options))
    assert nothing_here()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--bits", "three"], "--bits"),
        (["--device", "tpu"], "--device"),
        (["--color", "red"], "--color"),
    ],
)
def test_usage_errors_come_from_the_option_parser(bitmend, quantise, options, expected):
    outcome = bitmend(*quantise(*options))
    assert outcome.code == 2
    assert "Error: " in outcome.err
    assert expected in outcome.err
    assert "Traceback" not in outcome.err


def test_an_unknown_command(bitmend):
    outcome = bitmend("quantise", "x")
    assert outcome.code == 2
    assert "quantise" in outcome.err
    assert bitmend().code == 2  # the help, but nothing was done


# ------------------------------------------------------------------------------------------------ calibration
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "text.txt"),
        ("", "text.txt"),
        ("w3 w4 w5", "at least one sequence of 12 tokens is required, but there are 3 tokens"),
        (
            "w3 w4 w5 w6 w7 w8 w9 w10 w11 w12 w13 w14 w15",
            "8 different sequences of 12 tokens are required, but there are 1",
        ),
    ],
    ids=["missing", "empty", "short", "few"],
)
def test_calibration_that_does_not_do(refused, quantise, tmp_path, content, expected):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_text(content)
    assert expected in refused(*quantise(text=path))
    assert nothing_here()


def test_no_calibration(refused, tiny_model):
    assert "the recipe 'gptq' needs calibration data, but none came; pass --calibration FILE" in refused(
        "quantize", tiny_model
    )


# ------------------------------------------------------------------------------------------------ outputs
def test_an_output_that_exists(refused, bitmend, quantise):
    assert bitmend(*quantise("--recipe", "rtn")).code == 0
    before = snapshot("out")
    assert "out exists; choose another output, pass --resume to go on with it, or --overwrite" in refused(*quantise())
    assert snapshot("out") == before
    assert bitmend(*quantise("--overwrite", "--bits", "2")).code == 0
    assert snapshot("out") != before


def test_an_abandoned_partial_folder(refused, bitmend, quantise):
    Path("out.partial").mkdir()
    sentence = refused(*quantise("--recipe", "rtn"))
    assert "out.partial exists, left by a stopped run or in use by one under way; choose another" in sentence
    assert "pass --resume to go on with it, or --overwrite to replace it" in sentence
    assert bitmend(*quantise("--recipe", "rtn", "--overwrite")).code == 0
    assert names_here() == ["out"]


def test_a_failed_overwrite_keeps_the_old_output(refused, bitmend, quantise, monkeypatch):
    assert bitmend(*quantise("--recipe", "rtn")).code == 0
    before = snapshot(".")

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("bitmend.formats.writer.write_hashed", full)
    sentence = refused(*quantise("--recipe", "rtn", "--overwrite"), code=1)
    assert (
        "is full; free some space and run again; 2 finished blocks and 0 finished matrices of the next one" in sentence
    )
    assert {name: content for name, content in snapshot(".").items() if name.startswith("out/")} == before


def test_a_folder_that_is_no_model_is_not_replaced(refused, quantise):
    Path("out").mkdir()
    Path("out/precious.txt").write_text("mine")
    assert "is not empty and holds no model, so it is not replaced" in refused(
        *quantise("--recipe", "rtn", "--overwrite")
    )
    assert snapshot(".") == {"out/precious.txt": b"mine"}


def test_a_parent_that_cannot_be_written(refused, quantise, monkeypatch):
    Path("file").write_text("")
    assert "cannot be made: Not a directory" in refused(*quantise("--recipe", "rtn", output="file/out"))

    def deny(self, *arguments, **options):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", deny)
    sentence = refused(*quantise("--recipe", "rtn", output="new"))
    assert "cannot be made: Permission denied; choose another" in sentence
    assert names_here() == ["file"]


# ------------------------------------------------------------------------------------------------ result files
def unwritable():
    Path("folder.json").mkdir(exist_ok=True)
    return ["missing/result.json", "folder.json"]


@pytest.mark.parametrize("which", [0, 1])
def test_a_result_file_that_cannot_be_written_is_told_before_the_work(
    refused, quantise, quantised, tiny_model, tiny_text, which, monkeypatch
):
    path = unwritable()[which]
    monkeypatch.setattr("bitmend.pipeline.run.quantize", None)  # would fail if it were reached
    monkeypatch.setattr(sys.modules["bitmend.evaluate.evaluate"], "evaluate", None)
    expected = f"the result cannot be written to {path}: need a file in an existing folder"
    assert expected in refused(*quantise("--log-json", path))
    assert expected in refused("evaluate", tiny_model, "--text", tiny_text, "--json", path)
    assert not Path("out").exists()


@pytest.mark.parametrize("which", [0, 1])
def test_a_ledger_file_that_cannot_be_written(refused, quantised, which):
    path = unwritable()[which]
    assert path in refused("inspect", quantised, "--json", path)


def test_a_log_inside_the_output_is_fine(bitmend, quantise):
    assert bitmend(*quantise("--recipe", "rtn", "--log-json", "out/log.json")).code == 0
    assert json.loads(Path("out/log.json").read_text())["status"] == "done"


# ------------------------------------------------------------------------------------------------ encoders
@pytest.fixture
def towers(tiny, tmp_path):
    """A model with two towers, pictures of two classes, sentence pairs and names, all in one folder."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config=sizes | {"vocab_size": 61, "eos_token_id": 2, "bos_token_id": 1, "max_position_embeddings": 32},
        vision_config=sizes | {"image_size": 8, "patch_size": 4},
        projection_dim=12,
    )
    torch.manual_seed(0)
    folder = tiny.save(tmp_path / "clip", transformers.CLIPModel(config))
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    for name, value in {"w5": 0, "w6": 255}.items():
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for number in range(3):
            picture = Image.new("RGB", (8, 8), (value, 40 * number, 99))
            picture.save(tmp_path / "pictures" / name / f"{number}.png")
    (tmp_path / "pairs.tsv").write_text("w5 w6\tw7\t1\nw5\tw9 w10\t2\nw11\tw12\t3\n")
    (tmp_path / "names.txt").write_text("w5\nw6\n")
    return tmp_path


def test_a_tower_is_quantised_and_scored_by_pairs_and_by_classes(bitmend, towers):
    clip, pictures = towers / "clip", towers / "pictures"
    options = ("--bits", "4", "--group-size", "-1", "--quiet")
    for tower in ("text", "vision"):
        made = bitmend("quantize", clip, "--recipe", "rtn", "--tower", tower, *options, "--output", towers / tower)
        assert made.code == 0
    pairs = bitmend("evaluate", towers / "text", "--pairs", towers / "pairs.tsv", "--reference", clip, "--quiet")
    assert pairs.code == 0
    assert "rank correlation" in pairs.out
    embedded = bitmend("evaluate", towers / "vision", "--images", pictures, "--reference", clip, "--quiet")
    assert "cosine with reference" in embedded.out
    described = ("--class-names", towers / "names.txt", "--text-model", towers / "text")
    named = bitmend(
        "evaluate",
        towers / "vision",
        "--images",
        pictures,
        *described,
        "--reference",
        clip,
        "--quiet",
        "--json",
        "a.json",
    )
    assert named.code == 0
    (found,) = json.loads(Path("a.json").read_text())["models"][0]["images"]
    assert found["count"] == 6
    assert found["kl"] > 0
    assert bitmend("plan", clip, "--recipe", "rtn", "--tower", "vision", "--group-size", "-1").code == 0
    dry = bitmend("quantize", clip, "--recipe", "rtn", "--group-size", "-1", "--dry-run", "--output", "both")
    assert dry.code == 0
    assert dry.out.startswith("# would write ")
    assert not Path("both.towers").exists()


def test_towers_and_classes_that_cannot_be(refused, towers):
    clip = towers / "clip"
    assert "has two towers; pass --tower vision or --tower text" in refused("plan", clip, "--recipe", "rtn")
    assert "text_model.encoder.layers.0.self_attn.q_proj: group_size must divide" in refused(
        "quantize", clip, "--recipe", "rtn", "--quiet"
    )
    assert nothing_here()
    described = refused("evaluate", clip, "--images", towers / "pictures", "--text-model", clip)
    assert "but no classes came; pass --class-names FILE" in described


# ------------------------------------------------------------------------------------------------ evaluate, generate
def test_evaluate_that_cannot_be(refused, tiny_model, tiny_text, tmp_path):
    assert "evaluate needs at least one text, set of pictures or file of sentence pairs, but none came" in refused(
        "evaluate", tiny_model
    )
    missing = refused("evaluate", tiny_model, "--text", "none.txt", "--window-length", "16")
    assert missing == "none.txt: a text file is required, but there is none; check the path"
    (tmp_path / "short.txt").write_text("w3 w4 w5")
    short = refused("evaluate", tiny_model, "--text", tmp_path / "short.txt", "--window-length", "16")
    assert "at least one window of 16 tokens is required, but the text has 3" in short
    long = refused("evaluate", tiny_model, "--text", tiny_text)
    assert (
        "windows must fit the model's context of 64 tokens, but they have 512; pass --window-length 64 or less" in long
    )
    assert "does not exist" in refused("evaluate", "./none", "--text", tiny_text)


def test_generate_that_cannot_be(refused, tiny_model):
    assert "generate needs a prompt of at least one character" in refused("generate", tiny_model, "--prompt", "")
    assert "generate needs a prompt of at least one token" in refused("generate", tiny_model, "--prompt", "  ")
    sentence = refused("generate", tiny_model, "--prompt", "w3", "--tokens", "64")
    assert "must fit the model's context of 64 tokens, but are 1 + 64; pass --tokens 63" in sentence


def test_a_model_without_tokenizer(refused, quantise, tiny, tmp_path):
    tiny.build().save_pretrained(tmp_path / "bare")
    for arguments in (["generate", tmp_path / "bare", "--prompt", "w3"], quantise(model=tmp_path / "bare")):
        assert "a tokenizer is required" in refused(*arguments)
    assert nothing_here()


def test_an_unknown_format(refused, quantised):
    sentence = refused("export", quantised, "--format", "compressed-tensor", "--output", "exported")
    assert sentence == "no format is called 'compressed-tensor'; did you mean 'compressed-tensors'?"


# ------------------------------------------------------------------------------------------------ damaged checkpoints
def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def alter(folder):
    path = folder / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 1
    path.write_bytes(raw)


def lose_a_tensor(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.0.mlp.up_proj.weight_packed"]
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize("damage", [cut, alter, lose_a_tensor])
@pytest.mark.parametrize("command", ["evaluate", "generate", "inspect"])
def test_a_damaged_checkpoint(refused, quantised, copy_of, tiny_text, damage, command):
    folder = copy_of(quantised)
    damage(folder)
    more = {
        "evaluate": ["--text", tiny_text, "--window-length", "16", "--quiet"],
        "generate": ["--prompt", "w3"],
        "inspect": [],
    }[command]
    sentence = refused(command, folder, *more)
    assert str(folder) in sentence or "model.layers.0.mlp.up_proj.weight_packed" in sentence


# ------------------------------------------------------------------------------------------------ failures
@dataclass(frozen=True)
class Interrupted:
    needs: ClassVar[frozenset] = frozenset()
    block: ClassVar[str] = "model.layers.1"

    @staticmethod
    def stop():
        raise KeyboardInterrupt

    def solve(self, problem):
        if problem.site.name.startswith(self.block):
            self.stop()
        return Rtn().solve(problem)


@dataclass(frozen=True)
class Broken:
    needs: ClassVar[frozenset] = frozenset()

    def solve(self, problem):
        raise ZeroDivisionError("on\ntwo lines")


@dataclass(frozen=True)
class FallsBack:
    needs: ClassVar[frozenset] = frozenset()

    def solve(self, problem):
        solution = Rtn().solve(problem)
        event = Event("fallback", problem.site.name, "it fell back", True)
        return type(solution)(solution.qtensor, events=(event,))


def test_ctrl_c(bitmend, quantise, add_part):
    assert bitmend(*quantise("--recipe", "rtn")).code == 0
    before = snapshot(".")
    add_part.solver("interrupted", Interrupted)
    outcome = bitmend(*quantise("--recipe", "interrupted", "--overwrite"))
    assert outcome.code == 130
    assert outcome.err == (
        f"stopped; 1 finished blocks and 0 finished matrices of the next one are kept in {Path('out.partial').resolve()}; "
        "the same command with --resume goes on\n"
    )
    assert {name: content for name, content in snapshot(".").items() if name.startswith("out/")} == before
    assert names_here() == ["out", "out.partial"]


def test_ctrl_c_before_anything_is_finished(bitmend, quantise, add_part):
    add_part.solver("interrupted", type("AtOnce", (Interrupted,), {"block": "model.layers.0"}))
    outcome = bitmend(*quantise("--recipe", "interrupted"))
    assert (outcome.code, outcome.err) == (130, "stopped; nothing unfinished was left behind\n")
    assert nothing_here()


def test_sigterm(bitmend, quantise, add_part):
    """As Ctrl-C, but for the exit code; afterwards the signal does what it did before."""
    before = signal.getsignal(signal.SIGTERM)
    for block, sentence in (("0", "stopped; nothing unfinished was left behind"), ("1", "stopped; 1 finished blocks")):
        changes = {"block": f"model.layers.{block}", "stop": staticmethod(lambda: signal.raise_signal(signal.SIGTERM))}
        add_part.solver("terminated", type("Terminated", (Interrupted,), changes))
        outcome = bitmend(*quantise("--recipe", "terminated"))
        assert outcome.code == 143
        assert outcome.err.startswith(sentence)
    assert signal.getsignal(signal.SIGTERM) == before


def test_resume(bitmend, refused, quantise, add_part):
    add_part.solver("interrupted", Interrupted)
    assert bitmend(*quantise("--recipe", "interrupted", "--resume")).code == 130
    assert "made with another recipe; " in refused(*quantise("--recipe", "rtn", "--resume"))
    add_part.solver("interrupted", Rtn)
    loud = [argument for argument in quantise("--recipe", "interrupted", "--resume") if argument != "--quiet"]
    outcome = bitmend(*loud)
    assert outcome.code == 0
    assert "running finished blocks again: 1 of 1" in outcome.err
    assert names_here() == ["out"]
    outcome = bitmend(*loud)
    assert outcome.code == 0
    assert outcome.err.splitlines()[-1].startswith("nothing to do: out is finished")
    assert "made with another thread count" not in outcome.err
    assert "pass one of them" in refused(*quantise("--resume", "--overwrite"))
    assert "made with another recipe, another calibration rows" in refused(
        *quantise("--recipe", "interrupted", "--resume", "--seed", "9")
    )


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_that_foreign_code_turns_into_an_error(bitmend, quantise, add_part, number, code):
    """Conversions in torch and numpy do so when the signal comes while they ask an object for its shape."""

    def stop():
        try:
            signal.raise_signal(number)
        except BaseException:
            raise ValueError("could not determine the shape") from None

    add_part.solver("swallows", type("Swallows", (Interrupted,), {"stop": staticmethod(stop)}))
    outcome = bitmend(*quantise("--recipe", "swallows"))
    assert outcome.code == code
    assert outcome.err.startswith("stopped; 1 finished blocks")
    assert outcome.err.endswith("the same command with --resume goes on\n")


def test_an_unexpected_error_says_what_is_kept(refused, quantise, add_part):
    def stop():
        raise MemoryError("too little")

    add_part.solver("greedy", type("Greedy", (Interrupted,), {"stop": staticmethod(stop)}))
    sentence = refused(*quantise("--recipe", "greedy"), code=1)
    assert sentence.startswith(
        "unexpected MemoryError: too little (run again with --debug for the traceback); 1 finished"
    )
    assert sentence.endswith("the same command with --resume goes on")


def test_a_defect_is_one_line_unless_debug_is_asked_for(bitmend, refused, quantise, add_part):
    add_part.solver("broken", Broken)
    sentence = refused(*quantise("--recipe", "broken"), code=1)
    assert sentence == "unexpected ZeroDivisionError: on two lines (run again with --debug for the traceback)"
    outcome = bitmend(*quantise("--recipe", "broken", "--debug"))
    assert outcome.code == 1
    assert "Traceback" in outcome.err
    assert nothing_here()


def test_debug_shows_the_traceback_of_a_wrong_request(bitmend, quantise):
    outcome = bitmend("--debug", *quantise("--bits", "9"))
    assert outcome.code == 2
    assert "Traceback" in outcome.err
    assert outcome.err.splitlines()[-1].startswith("error: weights.bits")


def test_a_run_that_breaks_its_guard_is_complete_and_exits_1(bitmend, quantise, add_part):
    add_part.solver("falls_back", FallsBack)
    outcome = bitmend(*quantise("--recipe", "falls_back"))
    assert outcome.code == 1
    assert outcome.err.startswith(
        "error: 14 of 14 sites did not get what was asked for (first: model.layers.0.self_attn"
    )
    assert len(outcome.err.splitlines()) == 1
    assert "fallback at model.layers.0.self_attn.q_proj: it fell back" in outcome.out
    assert "... and 6 more events in run.json" in outcome.out
    assert transformers.AutoModelForCausalLM.from_pretrained("out") is not None


# ------------------------------------------------------------------------------------------------ real processes
@pytest.mark.slow
def test_a_real_process_in_which_ctrl_c_is_pressed(tiny, tiny_text, tmp_path):
    """Many blocks, so that the signal comes while they are quantised."""
    source = tiny.save(tmp_path / "source", tiny.build(num_hidden_layers=200))
    command = [
        sys.executable,
        "-c",
        "from bitmend.cli import main; main()",
        "quantize",
        str(source),
        "--recipe",
        "gptq",
    ]
    command += ["--calibration", str(tiny_text), "--sequences", "8", "--sequence-length", "32", "--group-size", "8"]
    process = subprocess.Popen(
        [*command, "--output", str(tmp_path / "out")], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    parts = tmp_path / "out.partial" / "parts"
    deadline = time.monotonic() + 120
    while not (parts.is_dir() and list(parts.iterdir())) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, (out, err)
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith("stopped; ")
    assert err.splitlines()[-1].endswith("the same command with --resume goes on")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.partial", "source"]


def test_a_real_process_says_one_sentence(tiny_model, tmp_path):
    """Whatever libraries print when they are first imported does not get between."""
    transformers.T5Config(architectures=["T5ForConditionalGeneration"], d_model=16, num_layers=1).save_pretrained(
        tmp_path / "t5"
    )
    command = [sys.executable, "-c", "from bitmend.cli import main; main()", "quantize", str(tmp_path / "t5")]
    result = subprocess.run([*command, "--recipe", "rtn"], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("error: no adapter reads T5ForConditionalGeneration")


def test_compensate(bitmend, quantised, tiny_model, tiny_text, tmp_path):
    asked = ["--reference", tiny_model, "--calibration", tiny_text, "--sequences", 12, "--sequence-length", 12]
    outcome = bitmend(
        "compensate", quantised, *asked, "--set", "structure=full", "--output", "made", "--log-json", "log.json"
    )
    assert outcome.code == 0, outcome
    assert "maps beside blocks: " in outcome.out
    assert "bits per quantised weight" in outcome.out
    report = json.loads(Path("log.json").read_text())
    assert [block["compensation"]["structure"] for block in report["blocks"]] == ["full", "full"]
    assert report["recipe"]["compensators"] == [{"name": "qwt", "structure": "full"}]
    again = bitmend("compensate", quantised, *asked, "--output", "made")
    assert again.code == 2
    assert "exists" in again.err


def test_compensate_with_requests_that_cannot_be(refused, quantised, tiny_model, tiny_text):
    asked = ["--reference", tiny_model, "--calibration", tiny_text, "--sequences", 12, "--sequence-length", 12]
    assert "is not quantised" in refused("compensate", tiny_model, *asked)
    assert "has no key 'structur'" in refused("compensate", quantised, *asked, "--set", "structur=full")
    assert "calibration" in refused("compensate", quantised, "--reference", tiny_model)
    assert "exist" in refused("compensate", quantised, "--reference", "./nowhere", "--calibration", tiny_text)
    assert not list(Path().iterdir())
