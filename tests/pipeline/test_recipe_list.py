import pytest

from bitmend.errors import RecipeError, RequestError, UnknownNameError
from bitmend.pipeline.recipe import load_recipe
from bitmend.pipeline.recipe_list import check_same_rows, parse_recipe_list, split_outside_values


def labels(*lists, **overrides):
    return [labelled.label for labelled in parse_recipe_list(lists, overrides)]


# ------------------------------------------------------------------------------------------------ what can be written
def test_entries_come_in_order_with_labels():
    found = parse_recipe_list(["rtn, gptq", "strong=gptaq:solver.residual_strength=1.0; weights.bits=3,"])
    assert [labelled.label for labelled in found] == ["rtn", "gptq", "strong"]
    assert found[1].recipe == load_recipe("gptq")
    keys = {"solver.residual_strength": 1.0, "weights.bits": 3}
    assert found[2].recipe == load_recipe("gptaq", keys)


def test_own_keys_win_over_those_of_all():
    found = parse_recipe_list(["rtn,other=rtn:weights.bits=2"], {"weights.bits": 3, "weights.group_size": 8})
    assert [labelled.recipe.weights.bits for labelled in found] == [3, 2]
    assert [labelled.recipe.weights.group_size for labelled in found] == [8, 8]


def test_a_file_is_labelled_by_its_stem(tmp_path):
    path = tmp_path / "mine-w1.5.toml"
    path.write_text("[weights]\nbits = 2\n")
    (found,) = parse_recipe_list([str(path)])
    assert (found.label, found.recipe.weights.bits) == ("mine-w1.5", 2)
    assert labels(f"a={path}:weights.bits=3") == ["a"]


def test_a_drive_letter_begins_no_keys():
    with pytest.raises(RequestError, match=r"the recipe file C:\\x\.toml does not exist"):
        parse_recipe_list([r"a=rtn,C:\x.toml"])


def test_values_may_hold_separators():
    value = '[{targets = ["re:.*o_proj", "b"], skip = true}]'
    (found,) = parse_recipe_list([f"a=rtn:overrides={value};weights.bits=3"])
    assert found.recipe.overrides[0].targets == ["re:.*o_proj", "b"]
    assert found.recipe.weights.bits == 3


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", [""]),
        ("a,b", ["a", "b"]),
        ("[a,[b,c],d],e", ["[a,[b,c],d]", "e"]),
        ("'a,]',b", ["'a,]'", "b"]),
        ('"it\'s, ",b', ['"it\'s, "', "b"]),
        ("[a,b", ["[a,b"]),
    ],
)
def test_split_outside_values(text, parts):
    assert split_outside_values(text, ",") == parts


# ------------------------------------------------------------------------------------------------ what cannot
@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        (" , ", r"a comparison needs at least one recipe, but none came; give RECIPE, LABEL=RECIPE or"),
        ("a=", r"the entry 'a=' names no recipe; it must look like RECIPE, LABEL=RECIPE or LABEL=RECIPE:KEY=VALUE"),
        (":weights.bits=3", r"the entry ':weights\.bits=3' names no recipe"),
        ("a=rtn:", r"the entry 'a=rtn:' must look like .*, but '' is no KEY=VALUE"),
        ("a=rtn:weights.bits", r"'weights\.bits' is no KEY=VALUE"),
        ("a=rtn:weights.bits=3;=4", r"'=4' is no KEY=VALUE"),
        ("a/b=rtn", r"'a/b' cannot be the label of 'rtn': a label holds letters, digits and \. _ \+ -"),
        ("=rtn", r"'' cannot be the label of 'rtn'"),
        ("..=rtn", r"'\.\.' cannot be the label"),
        ("a.partial=rtn", r"does not end in \.partial or \.replaced; write LABEL=rtn"),
        ("rtn,gptq,rtn:weights.bits=3", r"two recipes are labelled 'rtn'; give one of them a label of its own"),
        ("A=rtn,a=gptq", r"two recipes are labelled 'a'"),
        ("gtpq", r"recipe 'gtpq' of the comparison: no recipe is called 'gtpq'; did you mean 'gptq'\?"),
    ],
)
def test_an_entry_of_another_form(entry, sentence):
    with pytest.raises(RequestError, match=sentence):
        parse_recipe_list([entry])


def test_a_wrong_key_names_the_label():
    with pytest.raises(RecipeError, match=r"recipe 'a' of the comparison: solver 'gptq' has no key 'dampin'"):
        parse_recipe_list(["rtn,a=gptq:solver.dampin=1"])
    with pytest.raises(UnknownNameError, match=r"recipe 'a' of the comparison: .*did you mean 'gptq'\?"):
        parse_recipe_list(["a=rtn:solver.name=gptqq"])


# ------------------------------------------------------------------------------------------------ shared rows
def test_recipes_must_share_their_rows():
    check_same_rows(parse_recipe_list(["a=gptq:calibration.refit=false,gptq"]))
    for key, value in (("seed", 1), ("held_out", 0.5), ("sequences", 64), ("sequence_length", 9)):
        found = parse_recipe_list([f"gptq,b=gptq:calibration.{key}={value}"])
        with pytest.raises(
            RecipeError, match=rf"but calibration\.{key} is .* in 'gptq' and {value} in 'b'; set it for"
        ):
            check_same_rows(found)
