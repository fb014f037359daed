import tomllib
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitmend.errors import RecipeError, RequestError, UnknownNameError
from bitmend.numerics.granularity import PerChannel, PerGroup
from bitmend.pipeline.recipe import (
    RECIPES_FOLDER,
    OverrideSection,
    Recipe,
    load_recipe,
    parse_assignments,
    parse_recipe,
    recipe_names,
)
from bitmend.protocols import SOLVERS
from bitmend.routing import RareExperts

F32 = torch.float32


# ------------------------------------------------------------------------------------------------ there and back
def optional(**strategies):
    """Dictionaries in which each key may be missing."""
    return st.fixed_dictionaries({}, optional=strategies)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
GRID = {
    "bits": st.integers(1, 8),
    "group_size": st.sampled_from([-1, 1, 8, 128]),
    "symmetric": st.booleans(),
    "observer": st.sampled_from(["minmax", "percentile", "mse"]),
    "ragged": st.booleans(),
    "scale_dtype": st.sampled_from(["auto", "float16", "bfloat16", "float32"]),
}
TARGETS = st.lists(TEXT.filter(lambda text: not text.startswith("re:")) | st.just("re:.*down_proj"), min_size=1)
END = optional(
    bits=st.integers(2, 8), group_size=st.sampled_from([-1, 16]), observer=st.sampled_from(["minmax", "mse"])
)
GPTQ = optional(damping=st.floats(1e-300, 10), order=st.sampled_from(["natural", "diagonal"])).map(
    lambda keys: {"name": "gptq", **keys}
)
RECIPES = optional(
    name=TEXT,
    weights=optional(**GRID),
    solver=GPTQ | st.just({"name": "rtn"}),
    overrides=st.lists(
        optional(skip=st.booleans(), **GRID).flatmap(
            lambda keys: TARGETS.map(lambda found: {"targets": found, **keys})
        ),
        max_size=3,
    ),
    calibration=optional(
        sequences=st.integers(1),
        sequence_length=st.integers(2),
        held_out=st.floats(0, 1, exclude_max=True),
        seed=st.integers(0),
        refit=st.booleans(),
    ),
    embedding=END,
    head=END,
)


@given(RECIPES)
def test_a_recipe_reads_back_from_its_toml(keys):
    recipe = parse_recipe(keys)
    assert parse_recipe(tomllib.loads(recipe.to_toml())) == recipe


def test_toml_holds_resolved_keys():
    recipe = load_recipe("gptq", {"weights.bits": 3, "overrides": [{"targets": ["a"], "skip": True}]})
    keys = tomllib.loads(recipe.to_toml())
    assert keys["weights"]["bits"] == 3
    assert keys["weights"]["group_size"] == 128
    assert keys["overrides"] == [{"targets": ["a"], "skip": True}]
    assert keys["calibration"]["held_out"] == 0.25
    assert "embedding" not in keys


def test_a_transform_reads_back(add_part):
    @dataclass(frozen=True)
    class Scale:
        factor: float = 2.0
        only: tuple[str, ...] = ()

    add_part.transform("scale", Scale)
    recipe = parse_recipe({"transforms": [{"name": "scale", "factor": 3.0, "only": ["a", 'b"\n']}, {"name": "scale"}]})
    assert parse_recipe(tomllib.loads(recipe.to_toml())) == recipe
    assert recipe.build_transforms() == [Scale(3.0, ("a", 'b"\n')), Scale()]


def test_every_shipped_recipe_parses():
    for path in RECIPES_FOLDER.glob("*.toml"):
        assert load_recipe(path.stem).name == path.stem
    assert {entry.name for entry in SOLVERS} <= set(recipe_names())
    for name in recipe_names():
        recipe = load_recipe(name)
        assert recipe.name == name
        assert parse_recipe(tomllib.loads(recipe.to_toml())) == recipe


def test_a_file_is_named_after_itself_and_may_say_otherwise(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("[weights]\nbits = 2\n")
    assert load_recipe(path).name == "mine"
    assert load_recipe(str(path)).weights.bits == 2
    path.write_text('name = "other"\n')
    assert load_recipe(path).name == "other"


# ------------------------------------------------------------------------------------------------ wrong keys
@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"wieghts": {}}, r"unknown key 'wieghts'; did you mean 'weights'\?"),
        ({"weights": {"bitz": 3}}, r"unknown key 'weights\.bitz'; did you mean 'bits'\?"),
        ({"weights": {"xyzzy": 3}}, r"unknown key 'weights\.xyzzy'; known: bits, group_size, observer, ragged"),
        ({"calibration": {"sequence": 3}}, r"unknown key 'calibration\.sequence'; did you mean 'sequences'\?"),
        ({"embedding": {"bit": 3}}, r"unknown key 'embedding\.bit'; did you mean 'bits'\?"),
        ({"head": {"groupsize": 3}}, r"unknown key 'head\.groupsize'; did you mean 'group_size'\?"),
        (
            {"overrides": [{"targets": ["a"], "observr": "mse"}]},
            r"unknown key 'overrides\.0\.observr'; did you mean 'observer'\?",
        ),
        ({"solver": {"name": "gptq", "dampling": 1}}, r"solver 'gptq' has no key 'dampling'; did you mean 'damping'\?"),
        ({"solver": {"name": "rtn", "damping": 1}}, r"solver 'rtn' has no key 'damping'; it has no keys"),
        ({"solver": {"damping": 1}}, r"a solver must have a name, for example name = 'gptq'; got \{'damping': 1\}"),
        ({"transforms": [{"name": 3}]}, r"a transform must have a name, .* got \{'name': 3\}"),
    ],
)
def test_an_unknown_key_offers_the_nearest_one(keys, sentence):
    with pytest.raises(RecipeError, match=f"^{sentence}"):
        parse_recipe(keys)


@pytest.mark.parametrize("bits", [0, 9, -1, 3.5, "4", True])
def test_impossible_bits(bits):
    with pytest.raises(RecipeError, match=r"^weights\.bits: input should be .*; got "):
        parse_recipe({"weights": {"bits": bits}})
    with pytest.raises(RecipeError, match=r"^overrides\.0\.bits: input should be .*; got "):
        parse_recipe({"overrides": [{"targets": ["a"], "bits": bits}]})


@pytest.mark.parametrize("bits", [1, 9])
def test_impossible_bits_of_the_ends(bits):
    with pytest.raises(RecipeError, match=r"^embedding\.bits: input should be .*; got "):
        parse_recipe({"embedding": {"bits": bits}})


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("calibration", "held_out", 1.0),
        ("calibration", "held_out", -0.1),
        ("calibration", "sequences", 0),
        ("calibration", "sequence_length", 1),
        ("calibration", "seed", -1),
        ("weights", "observer", "magic"),
        ("weights", "scale_dtype", "int8"),
        ("weights", "group_size", 1.5),
    ],
)
def test_values_out_of_range_name_the_key_and_the_value(section, key, value):
    with pytest.raises(RecipeError, match=rf"^{section}\.{key}: input should be .*; got {value!r}"):
        parse_recipe({section: {key: value}})


def test_other_wrong_values():
    with pytest.raises(RecipeError, match=r"^overrides\.0\.targets: list should have at least 1 item .*; got \[\]"):
        parse_recipe({"overrides": [{"targets": []}]})
    with pytest.raises(RecipeError, match=r"^overrides\.0\.targets: field required"):
        parse_recipe({"overrides": [{"bits": 3}]})
    with pytest.raises(RecipeError, match=r"^solver 'gptq': damping: input should be a valid number, .*; got 'much'"):
        parse_recipe({"solver": {"name": "gptq", "damping": "much"}})
    with pytest.raises(RecipeError, match=r"'re:\(' is no regular expression: missing \)"):
        parse_recipe({"overrides": [{"targets": ["re:("]}]})


def test_group_size_zero_is_refused_when_the_grid_is_made():
    recipe = parse_recipe({"weights": {"group_size": 0}})
    with pytest.raises(RecipeError, match="group_size must be a positive number of columns, or -1"):
        recipe.scheme("a", F32)


def test_unknown_names():
    with pytest.raises(UnknownNameError, match=r"no solver is called 'gptk'; did you mean 'gptq'\?"):
        parse_recipe({"solver": {"name": "gptk"}})
    with pytest.raises(UnknownNameError, match="no transform is called 'spin'"):
        parse_recipe({"transforms": [{"name": "spin"}]})
    with pytest.raises(RequestError, match=r"no recipe is called 'gtpq'; did you mean 'gptq'\?"):
        load_recipe("gtpq")


def test_missing_and_broken_files(tmp_path):
    missing = tmp_path / "missing.toml"
    with pytest.raises(RequestError, match=r"the recipe file .*missing\.toml does not exist; `bitmend list recipes`"):
        load_recipe(missing)
    broken = tmp_path / "broken.toml"
    broken.write_text("[weights\nbits = 3\n")
    with pytest.raises(RecipeError, match=r"the recipe .*broken\.toml must be a TOML file: .*line 1"):
        load_recipe(broken)
    broken.write_bytes(b"name = '\xff'\n")
    with pytest.raises(RecipeError, match=r"the recipe .*broken\.toml must be a TOML file: .*utf-8"):
        load_recipe(broken)


# ------------------------------------------------------------------------------------------------ overrides
@pytest.mark.parametrize(
    ("target", "name", "expected"),
    [
        ("model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj", True),
        ("model.layers.0.mlp", "model.layers.0.mlp.up_proj", False),
        ("up_proj", "model.layers.0.mlp.up_proj", False),
        ("model.layers.0.mlp.up_pro.", "model.layers.0.mlp.up_proj", False),  # no pattern without `re:`
        ("re:.*up_proj", "model.layers.0.mlp.up_proj", True),
        ("re:up_proj", "model.layers.0.mlp.up_proj", False),  # from the start
        ("re:model", "model.layers.0.mlp.up_proj", True),  # not to the end
        (r"re:model\.layers\.1\.", "model.layers.11.mlp.up_proj", False),
    ],
)
def test_what_an_override_matches(target, name, expected):
    assert OverrideSection(targets=[target]).matches(name) is expected
    assert OverrideSection(targets=["nothing", target]).matches(name) is expected


def test_later_overrides_win_and_others_stay():
    recipe = parse_recipe(
        {
            "weights": {"bits": 4, "group_size": 8, "symmetric": False},
            "overrides": [
                {"targets": ["re:.*mlp"], "bits": 3, "observer": "minmax"},
                {"targets": ["re:.*down"], "bits": 2, "group_size": -1},
                {"targets": ["re:.*skip"], "skip": True},
                {"targets": ["x.mlp.skip"], "skip": False, "bits": 8},
            ],
        }
    )
    up, down, other = (recipe.scheme(name, F32) for name in ("x.mlp.up", "x.mlp.down", "x.attn.q"))
    assert (up.grid.bits, up.observer, up.granularity, up.grid.symmetric) == (3, "minmax", PerGroup(8), False)
    assert (down.grid.bits, down.observer, down.granularity) == (2, "minmax", PerChannel())
    assert (other.grid.bits, other.observer) == (4, "mse")
    assert recipe.scheme("y.skip", F32) is None
    assert recipe.scheme("x.mlp.skip", F32).grid.bits == 8


@pytest.mark.parametrize(
    ("wanted", "model", "expected"),
    [
        ("auto", torch.float32, torch.bfloat16),
        ("auto", torch.float16, torch.float16),
        ("auto", torch.bfloat16, torch.bfloat16),
        ("float32", torch.bfloat16, torch.float32),
        ("bfloat16", torch.float32, torch.bfloat16),
    ],
)
def test_scale_dtype(wanted, model, expected):
    assert parse_recipe({"weights": {"scale_dtype": wanted}}).scheme("a", model).scale_dtype == expected


# ------------------------------------------------------------------------------------------------ --set
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.b=3", 3),
        ("a.b=-1", -1),
        ("a.b=0.05", 0.05),
        ("a.b=1e-3", 0.001),
        ("a.b=true", True),
        ("a.b=false", False),
        ("a.b=natural", "natural"),
        ('a.b="3"', "3"),
        ("a.b=", ""),
        ("a.b=x=y", "x=y"),
        ("a.b=re:.*down", "re:.*down"),
        ('a.b=["x", "y"]', ["x", "y"]),
        ("a.b = 3", 3),
    ],
)
def test_values_on_the_command_line(text, expected):
    found = parse_assignments([text])
    assert found == {"a.b": expected}
    assert type(found["a.b"]) is type(expected)


@pytest.mark.parametrize("text", ["solver.damping", "", "=3"])
def test_an_assignment_needs_a_key_and_a_value(text):
    with pytest.raises(RequestError, match=r"--set must look like solver\.damping=0\.05; got "):
        parse_assignments([text])


def test_dotted_keys_reach_sections_lists_and_solvers(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('[[overrides]]\ntargets = ["a"]\n[[overrides]]\ntargets = ["b"]\nbits = 3\n')
    keys = {"overrides.1.bits": 2, "weights.bits": 8, "solver.damping": 0.5, "name": "x", "embedding.bits": 6}
    recipe = load_recipe(path, keys)
    assert [one.bits for one in recipe.overrides] == [None, 2]
    assert recipe.weights.bits == 8
    assert recipe.build_solver().damping == 0.5
    assert recipe.name == "x"
    assert recipe.embedding.bits == 6
    assert load_recipe("gptq", {"solver.name": "rtn"}).solver == {"name": "rtn"}


@pytest.mark.parametrize(
    ("key", "sentence"),
    [
        ("overrides.2.bits", r"the key 'overrides\.2\.bits' leads nowhere at '2'"),
        ("overrides.first.bits", r"the key 'overrides\.first\.bits' leads nowhere at 'first'"),
        ("weights.bits.more.x", r"the key 'weights\.bits\.more\.x' leads nowhere at 'more'"),
        ("weights.bits.more", r"the key 'weights\.bits\.more' must name a key of a section, such as solver\.damping"),
        ("overrides.0", r"the key 'overrides\.0' must name a key of a section"),
        ("wieghts.bits", r"unknown key 'wieghts'; did you mean 'weights'\?"),
        ("bits", r"unknown key 'bits'"),
    ],
)
def test_keys_that_lead_nowhere(tmp_path, key, sentence):
    path = tmp_path / "mine.toml"
    path.write_text('[weights]\nbits = 3\n[[overrides]]\ntargets = ["a"]\n')
    with pytest.raises(RecipeError, match=sentence):
        load_recipe(path, {key: 2})


# ------------------------------------------------------------------------------------------------ as an object
def test_a_recipe_object_is_checked_too():
    assert Recipe().solver == {"name": "gptq"}
    with pytest.raises(RecipeError, match=r"solver 'gptq' has no key 'x'"):
        Recipe(solver={"name": "gptq", "x": 1})


def test_a_solver_gets_its_fields(add_part):
    @dataclass(frozen=True)
    class Toy:
        needs: ClassVar[frozenset] = frozenset()
        sharp: bool = False
        steps: int = 3

    add_part.solver("toy", Toy)
    assert load_recipe("toy", parse_assignments(["solver.sharp=true", "solver.steps=7"])).build_solver() == Toy(True, 7)


@pytest.mark.parametrize("solver", ["gptq", "gptaq", "rescomp", "qep", "coreq", "marr", "strength_grid"])
@pytest.mark.parametrize("damping", [0.0, -1.0, float("nan"), float("inf"), 11.0])
def test_a_damping_that_cannot_be_is_refused_when_the_recipe_is_read(solver, damping):
    with pytest.raises(RecipeError, match=rf"solver '{solver}': damping: input should be"):
        load_recipe(solver, {"solver.damping": damping})


def test_keys_of_experts():
    plain = load_recipe("gptq")
    assert plain.calibration.rare() == RareExperts("pool", None)
    # Recipes of dense models keep their fingerprint.
    assert not {"rare_experts", "min_tokens_per_expert"} & plain.model_dump(exclude_none=True)["calibration"].keys()
    keys = {"calibration.rare_experts": "rtn", "calibration.min_tokens_per_expert": 64}
    recipe = load_recipe("gptq", keys)
    assert recipe.calibration.rare() == RareExperts("rtn", 64)
    assert parse_recipe(tomllib.loads(recipe.to_toml())) == recipe
    with pytest.raises(RecipeError, match=r"calibration\.rare_experts: .*'pool', 'rtn' or 'refuse'; got 'drop'"):
        load_recipe("gptq", {"calibration.rare_experts": "drop"})
    with pytest.raises(RecipeError, match=r"calibration\.min_tokens_per_expert: .*got 0"):
        load_recipe("gptq", {"calibration.min_tokens_per_expert": 0})
