import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitmend.compensation import CompensationShape
from bitmend.errors import CheckpointError, RequestError
from bitmend.formats.manifest import (
    Manifest,
    ManifestEntry,
    compensation_from_json,
    quantization_config,
    spec_from_json,
    spec_to_json,
)
from bitmend.linalg.greedy_rotation import BlockRotation
from bitmend.linalg.hadamard import Rotation
from bitmend.numerics.activations import ActivationSpec
from bitmend.numerics.granularity import PerChannel, PerGroup, PerTensor, PerToken
from bitmend.numerics.log_sqrt2 import LogSqrt2Spec
from bitmend.numerics.qtensor import QuantSpec
from bitmend.numerics.twin_uniform import TwinGeluSpec, TwinSoftmaxSpec
from bitmend.numerics.uniform import UniformGrid
from bitmend.online import AttentionScheme, InputScheme, PrefixShape

SPEC = QuantSpec(UniformGrid(4, True), PerGroup(32), "mse", torch.bfloat16)

specs = st.builds(
    QuantSpec,
    st.builds(UniformGrid, st.integers(1, 8), st.booleans()),
    st.one_of(
        st.just(PerTensor()), st.just(PerChannel()), st.builds(PerGroup, st.integers(1, 4096), st.booleans())
    ),
    st.sampled_from(["minmax", "percentile", "mse"]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)  # fmt: skip


@given(specs)
def test_schemes_survive_json(spec):
    assert spec_from_json(json.loads(json.dumps(spec_to_json(spec)))) == spec


@given(st.dictionaries(st.text(min_size=1), specs, max_size=6))
def test_manifests_survive_json(named):
    modules = {name: ManifestEntry(spec, (3, 4), "conv1d") for name, spec in named.items()}
    manifest = Manifest(modules, provenance={"solver": "gptq"}, files={"model.safetensors": "00"})
    assert Manifest.from_json(json.loads(json.dumps(manifest.to_json()))) == manifest


@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d", "grouped_conv2d", "embedding"])
def test_kinds_survive_json(kind):
    manifest = Manifest({"a": ManifestEntry(SPEC, (8, 32), kind)})
    assert Manifest.from_json(json.loads(json.dumps(manifest.to_json()))) == manifest


def test_equal_schemes_are_stored_once():
    other = QuantSpec(UniformGrid(3, False), PerChannel())
    entries = {f"layers.{n}": ManifestEntry(SPEC if n % 2 else other, (8, 32)) for n in range(6)}
    config = quantization_config(entries, provenance={"solver": "rtn"})
    assert config["quant_method"] == "bitmend"
    assert len(config["schemes"]) == 2
    assert [item["scheme"] for item in config["modules"].values()] == [0, 1] * 3
    assert config["schemes"][1] == {
        "layout": "uniform", "bits": 4, "symmetric": True, "group_size": 32, "ragged": False,
        "scale_dtype": "bfloat16", "observer": "mse",
    }  # fmt: skip
    assert config["provenance"] == {"solver": "rtn"}


def test_group_sizes_of_the_two_plain_granularities():
    assert spec_to_json(QuantSpec(UniformGrid(4, True), PerChannel()))["group_size"] == -1
    assert spec_to_json(QuantSpec(UniformGrid(4, True), PerTensor()))["group_size"] == 0


def test_what_no_file_can_say_is_refused():
    with pytest.raises(RequestError, match="got one per token"):
        spec_to_json(QuantSpec(UniformGrid(4, True), PerToken()))
    with pytest.raises(RequestError, match="scale_dtype must be one of float32, bfloat16, float16; got float64"):
        spec_to_json(QuantSpec(UniformGrid(4, True), scale_dtype=torch.float64))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["format_version"], 7, "has format_version 7, this release reads up to 6"),
        (["format_version"], True, "needs 'format_version' to be of type int; got True"),
        (["schemes"], {}, "needs 'schemes' to be of type list"),
        (["schemes", 0], 4, r"each of quantization_config\.schemes must be a table"),
        (["schemes", 0, "layout"], "codebook", "uses the layout 'codebook', this release reads uniform"),
        (["schemes", 0, "bits"], 9, "impossible: bits must be a whole number from 1 to 8; got 9"),
        (["schemes", 0, "bits"], "4", "needs 'bits' to be of type int; got '4'"),
        (["schemes", 0, "symmetric"], 1, "needs 'symmetric' to be of type bool; got 1"),
        (["schemes", 0, "group_size"], -2, "has scale_dtype 'bfloat16', observer 'mse' and group_size -2"),
        (["schemes", 0, "scale_dtype"], "int8", "has scale_dtype 'int8'"),
        (["schemes", 0, "observer"], "guess", "observer 'guess'"),
        (["modules"], [], "needs 'modules' to be of type dict"),
        (["modules", "a"], 0, r"modules\['a'\] must be a table"),
        (["modules", "a", "scheme"], 1, "a uses scheme 1 of quantization_config, which has 1"),
        (["modules", "a", "scheme"], -1, "a uses scheme -1"),
        (["modules", "a", "shape"], [4], r"the shape of a in quantization_config must be \[out, in\]"),
        (["modules", "a", "shape"], [4, 0], "the shape of a"),
        (["modules", "a", "shape"], [4, 32.0], "the shape of a"),
        (["modules", "a", "kind"], "conv9d", "a is of kind 'conv9d'"),
        (["tied"], {"b": "a"}, "ties 'b' to 'a', which is no embedding"),
        (["tied"], {"b": 3}, "which is no embedding"),
        (["files"], {"f": 3}, "files must map file names to sha256"),
        (["provenance"], None, "needs 'provenance' to be of type dict; got nothing"),
    ],
)
def test_an_altered_manifest_is_refused(path, value, message):
    config = quantization_config({"a": ManifestEntry(SPEC, (4, 32))})
    table = config
    for key in path[:-1]:
        table = table[key]
    table[path[-1]] = value
    with pytest.raises(CheckpointError, match=message):
        Manifest.from_json(config)


def test_a_scheme_of_the_same_shapes_is_told_by_the_seal():
    """Groups of 16 and ragged groups of 20 of a width of 32 have tensors of the same shapes, and other weights."""
    spec = QuantSpec(UniformGrid(4, True), PerGroup(16), "mse", torch.bfloat16)
    config = Manifest({"m": ManifestEntry(spec, (8, 32))}).to_json()
    assert Manifest.from_json(json.loads(json.dumps(config))).modules["m"].spec == spec
    config["schemes"][0] |= {"group_size": 20, "ragged": True}
    with pytest.raises(
        CheckpointError, match=r"are not those that were written \(their seal differs\); copy config\.json"
    ):
        Manifest.from_json(config)
    del config["seal"]  # as older versions wrote it
    assert Manifest.from_json(config).modules["m"].spec.granularity == PerGroup(20, ragged=True)


# ------------------------------------------------------------------------------------------------ activations
INPUTS = {
    "layers.0.down": InputScheme(Rotation(12, None, 2), ActivationSpec(4, False, 8, 0.9)),
    "layers.0.up": InputScheme(None, ActivationSpec(8)),
    "norm": InputScheme(Rotation(16, 2**70, 1, True)),
}


def online_config():
    manifest = Manifest({"a": ManifestEntry(SPEC, (8, 32))}, inputs=INPUTS, outputs={"embed": Rotation(16, 3)})
    return manifest, json.loads(json.dumps(manifest.to_json()))


def test_what_is_done_to_activations_survives_json():
    manifest, config = online_config()
    assert config["format_version"] == 2  # so that readers that know nothing of it refuse
    assert Manifest.from_json(config) == manifest
    keeping = replace(manifest, outputs={"embed": Rotation(16, 3, keeps_mean=True)})
    config = json.loads(json.dumps(keeping.to_json()))
    assert config["format_version"] == 5
    assert Manifest.from_json(config) == keeping
    plain = Manifest({"a": ManifestEntry(SPEC, (8, 32))}).to_json()
    assert plain["format_version"] == 1
    assert "inputs" not in plain


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("inputs", "norm"), {}, "must be a table of rotation or activations"),
        (("inputs", "norm"), {"rotation": {"size": 4}}, "'inner' to be of type int"),
        (("inputs", "norm", "rotation", "size"), 0, "must rotate 1 to"),
        (("inputs", "norm", "rotation", "size"), 2**40, "must rotate 1 to"),
        (("inputs", "norm", "rotation", "inner"), -1, "must rotate 1 to"),
        (("inputs", "norm", "rotation", "seed"), 1.5, "must say size, seed, inner"),
        (("inputs", "norm", "rotation", "more"), 1, "must say size, seed, inner"),
        (("inputs", "norm", "rotation", "transposed"), 1, "'transposed' to be of type bool"),
        (("inputs", "norm", "rotation", "keeps_mean"), 1, "'keeps_mean' to be of type bool"),
        (("inputs", "norm", "rotation", "keeps_mean"), True, "which came with 5"),
        (("inputs", "layers.0.up", "activations", "bits"), 1, r"at layers\.0\.up is impossible: activation bits"),
        (("inputs", "layers.0.up", "activations", "clip_ratio"), 1, "'clip_ratio' to be of type float"),
        (("inputs", "layers.0.up", "activations", "clip_ratio"), float("nan"), "clip_ratio must lie above 0"),
        (("outputs", "embed"), {"activations": {"bits": 4}}, "of type bool"),
        (("inputs",), [], "'inputs' to be of type dict"),
    ],
)
def test_hostile_activations_are_refused(place, value, message):
    _, config = online_config()
    del config["seal"]
    table = config
    for key in place[:-1]:
        table = table[key]
    table[place[-1]] = value
    with pytest.raises(CheckpointError, match=message):
        Manifest.from_json(config)


BLOCKS = BlockRotation(4, 1, (2, 0), (3, 1, 2, 0, 7, 6, 5, 4), (1,))
KEPT = ActivationSpec(4, False, 8, 0.9, 16)
ATTENTIONS = {
    "layers.0.attn": AttentionScheme(Rotation(8), None, KEPT, KEPT),
    "layers.1.attn": AttentionScheme(None, ActivationSpec(8), None, None, ActivationSpec(8, False)),
}


def attending_config():
    inputs = {
        "layers.0.k": InputScheme(BLOCKS, ActivationSpec(4)),
        "layers.0.v": InputScheme(BLOCKS),
        "layers.0.o": InputScheme(BLOCKS.inverse),
        "layers.1.k": InputScheme(Rotation(16)),
    }
    manifest = Manifest({"a": ManifestEntry(SPEC, (8, 32))}, inputs=inputs, attentions=ATTENTIONS)
    return manifest, json.loads(json.dumps(manifest.to_json()))


def test_what_is_done_inside_the_attention_survives_json():
    manifest, config = attending_config()
    assert config["format_version"] == 3
    assert Manifest.from_json(config) == manifest
    # Rotations that are made for a layer's inputs are stored once for those that share them.
    assert len(config["rotations"]) == 2
    assert [config["inputs"][f"layers.0.{name}"]["rotation"]["shared"] for name in "kvo"] == [0, 0, 1]
    only = Manifest({"a": ManifestEntry(SPEC, (8, 32))}, inputs={"b": InputScheme(BLOCKS)})
    assert Manifest.from_json(only.to_json()) == only


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("attentions", "layers.0.attn"), {}, "must be a table of rotation, prefix, queries"),
        (("attentions", "layers.0.attn", "keys", "bits"), 1, r"inside the attention layers\.0\.attn is impossible"),
        (("attentions", "layers.0.attn", "keys", "scale_bits"), 8, "must have 16 or 32 bits"),
        (("attentions", "layers.0.attn", "keys", "scale_bits"), "16", "of type int"),
        (("attentions", "layers.0.attn", "rotation"), {"shared": 0}, "names rotation 0, but there are 0"),
        (("inputs", "layers.0.k", "rotation", "shared"), 2, "names rotation 2, but there are 2"),
        (("inputs", "layers.0.k", "rotation", "shared"), -1, "names rotation -1"),
        (("rotations",), {}, "'rotations' to be of type list"),
        (("rotations", 0), 3, "must say block, seed, first"),
        (("rotations", 0, "block"), 3, "must divide the width"),
        (("rotations", 0, "block"), 10**9, "must have blocks of 1 to"),
        (("rotations", 0, "order"), "3 1 2 1 7 6 5 4", "must name each feature once"),
        (("rotations", 0, "order"), "3 1 2 9 7 6 5 4", "must name each feature once"),
        (("rotations", 0, "order"), "3 1 2 " + "9" * 30, "must list whole numbers"),
        (("rotations", 0, "order"), "3 1 2 1.0", "must list whole numbers"),
        (("rotations", 0, "order"), "3  1", "must list whole numbers"),
        (("rotations", 0, "order"), "0 " * 10**7, "must list whole numbers"),
        (("rotations", 0, "order"), [3, 1], "'order' to be of type str"),
        (("rotations", 0, "order"), "", "impossible: blocks"),
        (("rotations", 0, "first"), "4", "must be features of a block"),
        (("rotations", 0, "first"), " ".join("0" * 5000), "at most 4096 steps"),
        (("rotations", 0, "seed"), -1, "a seed of 0 or more"),
    ],
)
def test_hostile_attentions_and_rotations_are_refused(place, value, message):
    _, config = attending_config()
    del config["seal"]
    table = config
    for key in place[:-1]:
        table = table[key]
    table[place[-1]] = value
    with pytest.raises(CheckpointError, match=message):
        Manifest.from_json(config)


def test_outputs_are_rotated_and_nothing_else():
    _, config = online_config()
    del config["seal"]
    config["outputs"]["embed"] = config["inputs"]["layers.0.down"]
    with pytest.raises(CheckpointError, match="must hold a rotation and nothing else"):
        Manifest.from_json(config)


def test_changed_activations_break_the_seal():
    _, config = online_config()
    config["inputs"]["layers.0.up"]["activations"]["bits"] = 4
    with pytest.raises(CheckpointError, match="their seal differs"):
        Manifest.from_json(config)


def test_ranges_and_a_prefix_survive_json_in_a_version_of_their_own():
    static = ActivationSpec(4, ranges=(2.5,))
    heads = replace(static, ranges=(0.5, 3.0), scale_bits=16)
    kept = AttentionScheme(keys=heads, values=heads, prefix=PrefixShape(2, 2, 8, 16))
    for found in (
        Manifest({"a": ManifestEntry(SPEC, (8, 32))}, inputs={"b": InputScheme(activations=static)}),
        Manifest({"a": ManifestEntry(SPEC, (8, 32))}, attentions={"c": kept}),
        Manifest({"a": ManifestEntry(SPEC, (8, 32))}, attentions={"c": AttentionScheme(prefix=kept.prefix)}),
    ):
        config = json.loads(json.dumps(found.to_json()))
        assert config["format_version"] == 4
        assert Manifest.from_json(config) == found
        del config["seal"]
        with pytest.raises(
            CheckpointError, match="has format_version 3, but holds ranges or a prefix, which came with 4"
        ):
            Manifest.from_json({**config, "format_version": 3})
    with pytest.raises(RequestError, match="static ranges must be found before they are stored"):
        Manifest({}, inputs={"b": InputScheme(activations=replace(static, ranges=()))}).to_json()


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ([], "must have 1 to 4096 ranges, numbers"),
        ([1], "must have 1 to 4096 ranges, numbers"),
        (["1.0"], "must have 1 to 4096 ranges, numbers"),
        ([1.0] * 5000, "must have 1 to 4096 ranges, numbers"),
        ([0.0], "must be positive and finite"),
        ([float("nan")], "must be positive and finite"),
        ([float("inf")], "must be positive and finite"),
        (2.0, "'ranges' to be of type list"),
    ],
)
def test_hostile_ranges_are_refused(ranges, message):
    spec = ActivationSpec(4, ranges=(2.5,))
    config = Manifest({"a": ManifestEntry(SPEC, (8, 32))}, inputs={"b": InputScheme(activations=spec)}).to_json()
    del config["seal"]
    config["inputs"]["b"]["activations"]["ranges"] = ranges
    with pytest.raises(CheckpointError, match=message):
        Manifest.from_json(config)


# ------------------------------------------------------------------------------------------------ of vision transformers
VISION_INPUTS = {
    "fc1": InputScheme(activations=ActivationSpec(4, False, ranges=(2.5,), lows=(-0.25,))),
    "fc2": InputScheme(Rotation(12), TwinGeluSpec(4, 3.5)),
    "out": InputScheme(activations=LogSqrt2Spec(6, 2.0)),
}
VISION_ATTENTIONS = {
    "attention.0": AttentionScheme(None, ActivationSpec(4, ranges=(1.0,)), None, None, LogSqrt2Spec(4, 0.75)),
    "attention.1": AttentionScheme(probabilities=TwinSoftmaxSpec(4, 6)),
    "attention.2": AttentionScheme(values=ActivationSpec(4, False, ranges=(1.0, 0.0), lows=(-0.5, -2.0))),
}


def vision_config():
    modules = {"a": ManifestEntry(SPEC, (8, 32))}
    manifest = Manifest(modules, inputs=VISION_INPUTS, attentions=VISION_ATTENTIONS)
    return manifest, json.loads(json.dumps(manifest.to_json()))


def test_grids_of_vision_transformers_survive_json():
    manifest, config = vision_config()
    assert config["format_version"] == 5
    assert Manifest.from_json(config) == manifest
    assert config["inputs"]["fc1"]["activations"] == {
        "bits": 4, "symmetric": False, "group_size": -1, "clip_ratio": 1.0, "ranges": [2.5], "lows": [-0.25],
    }  # fmt: skip
    assert config["inputs"]["fc2"]["activations"] == {"kind": "twin_gelu", "bits": 4, "range": 3.5}
    assert config["attentions"]["attention.0"]["probabilities"] == {"kind": "log_sqrt2", "bits": 4, "range": 0.75}
    assert config["attentions"]["attention.1"]["probabilities"] == {
        "kind": "twin_softmax", "bits": 4, "split_exponent": 6,
    }  # fmt: skip


@pytest.mark.parametrize("name", [*VISION_INPUTS, "attention.0", "attention.1", "attention.2"])
def test_older_versions_do_not_hold_grids_of_vision_transformers(name):
    inputs = {name: VISION_INPUTS[name]} if name in VISION_INPUTS else {}
    attentions = {} if inputs else {name: VISION_ATTENTIONS[name]}
    found = Manifest({"a": ManifestEntry(SPEC, (8, 32))}, inputs=inputs, attentions=attentions)
    config = json.loads(json.dumps(found.to_json()))
    assert config["format_version"] == 5
    del config["seal"]
    with pytest.raises(
        CheckpointError, match=r"version 4, but holds ranges with zero points or grids that are not uniform"
    ):
        Manifest.from_json({**config, "format_version": 4})


def test_the_json_of_symmetric_and_dynamic_grids_is_as_it_was():
    def written(spec):
        return Manifest({}, inputs={"b": InputScheme(activations=spec)}).to_json()["inputs"]["b"]["activations"]

    keys = {"bits": 4, "symmetric": True, "group_size": -1, "clip_ratio": 1.0}
    assert written(ActivationSpec(4)) == keys
    assert written(ActivationSpec(4, ranges=(2.0,))) == {**keys, "ranges": [2.0]}
    assert written(ActivationSpec(4, False, 8)) == {**keys, "symmetric": False, "group_size": 8}
    _, config = online_config()
    del config["seal"]
    config["inputs"]["layers.0.up"]["activations"]["kind"] = "uniform"  # what none says
    assert Manifest.from_json(config).inputs == INPUTS


@pytest.mark.parametrize(
    "spec", [LogSqrt2Spec(4), TwinGeluSpec(4), ActivationSpec(4, False, ranges=(), lows=())], ids=repr
)
def test_ranges_that_are_not_known_yet_are_not_stored(spec):
    with pytest.raises(RequestError, match="static ranges must be found before they are stored"):
        Manifest({}, inputs={"b": InputScheme(activations=spec)}).to_json()


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("inputs", "fc1", "activations", "lows"), [], "must have 1 to 4096 lows, numbers"),
        (("inputs", "fc1", "activations", "lows"), [-1], "must have 1 to 4096 lows, numbers"),
        (("inputs", "fc1", "activations", "lows"), [-1.0] * 5000, "must have 1 to 4096 lows, numbers"),
        (("inputs", "fc1", "activations", "lows"), -1.0, "'lows' to be of type list"),
        (("inputs", "fc1", "activations", "lows"), None, "'lows' to be of type list; got nothing"),
        (("inputs", "fc1", "activations", "lows"), [-1.0, -1.0], "as many lows as ranges; got 2 lows and 1 ranges"),
        (("inputs", "fc1", "activations", "lows"), [0.5], "at fc1 is impossible: static ranges with zero points"),
        (("inputs", "fc1", "activations", "lows"), [float("nan")], "must be finite, hold 0"),
        (("inputs", "fc1", "activations", "lows"), [float("-inf")], "must be finite, hold 0"),
        (("inputs", "fc1", "activations", "ranges"), [-0.5], "must be finite, hold 0"),
        (("inputs", "fc1", "activations", "symmetric"), True, "impossible: lows are the lower ends"),
        (
            ("inputs", "fc2", "activations", "kind"),
            "codebook",
            "has a grid of the kind 'codebook', this release reads uniform",
        ),
        (("inputs", "fc2", "activations", "kind"), 3, "'kind' to be of type str; got 3"),
        (("inputs", "fc2", "activations", "kind"), "uniform", "'symmetric' to be of type bool; got nothing"),
        (("inputs", "fc2", "activations", "kind"), "twin_softmax", "must say kind, bits and split_exponent of a grid"),
        (("inputs", "fc2", "activations", "more"), 1, "must say kind, bits and range of a grid"),
        (("inputs", "fc2", "activations", "bits"), 9, "at fc2 is impossible: activation bits must be a whole number"),
        (("inputs", "fc2", "activations", "bits"), 4.0, "'bits' to be of type int"),
        (("inputs", "fc2", "activations", "bits"), True, "'bits' to be of type int"),
        (("inputs", "fc2", "activations", "range"), 2, "'range' to be of type float"),
        (("inputs", "fc2", "activations", "range"), None, "'range' to be of type float; got nothing"),
        (("inputs", "fc2", "activations", "range"), -1.0, "impossible: the range of activations must be positive"),
        (
            ("inputs", "fc2", "activations", "range"),
            float("inf"),
            "the range of activations must be positive and finite",
        ),
        (("inputs", "fc2", "activations", "range"), 1e300, "the range of activations must be positive and finite"),
        (("attentions", "attention.0", "probabilities", "range"), float("nan"), "must be positive and finite; got nan"),
        (("attentions", "attention.1", "probabilities", "split_exponent"), 20, "must be a whole number from 0 to 19"),
        (("attentions", "attention.1", "probabilities", "split_exponent"), -1, "must be a whole number from 0 to 19"),
        (("attentions", "attention.1", "probabilities", "split_exponent"), 6.0, "'split_exponent' to be of type int"),
        (
            ("attentions", "attention.1", "probabilities"),
            {"kind": "twin_softmax"},
            "must say kind, bits and split_exponent",
        ),
    ],
)
def test_hostile_grids_of_vision_transformers_are_refused(place, value, message):
    _, config = vision_config()
    del config["seal"]
    table = config
    for key in place[:-1]:
        table = table[key]
    table[place[-1]] = value
    with pytest.raises(CheckpointError, match=message):
        Manifest.from_json(config)


@pytest.mark.parametrize("operand", ["queries", "keys", "values"])
def test_what_has_two_signs_or_is_cached_needs_a_uniform_grid(operand):
    _, config = vision_config()
    del config["seal"]
    config["attentions"]["attention.1"][operand] = {"kind": "log_sqrt2", "bits": 4, "range": 1.0}
    with pytest.raises(CheckpointError, match=f"must round {operand} on a uniform grid; got .'kind': 'log_sqrt2'"):
        Manifest.from_json(config)


BESIDE = {
    "structure": "low_rank",
    "inputs": 8,
    "outputs": 8,
    "rank": 2,
    "groups": 1,
    "channels_first": False,
    "stride": 1,
    "clamped": False,
}


def test_maps_beside_blocks_come_back_and_need_the_sixth_version():
    shapes = {
        "b.0": CompensationShape("low_rank", 8, 8, rank=2),
        "b.1": CompensationShape("block_diagonal", 64, 128, groups=2, channels_first=True, stride=2, clamped=True),
    }
    config = json.loads(json.dumps(quantization_config({"a": ManifestEntry(SPEC, (4, 32))}, compensations=shapes)))
    assert config["format_version"] == 6
    assert Manifest.from_json(config).compensations == shapes
    config["compensations"]["b.0"]["rank"] = 3
    with pytest.raises(CheckpointError, match="seal"):
        Manifest.from_json(config)


@pytest.mark.parametrize(
    "change",
    [
        {"structure": "cubic"},
        {"structure": 3},
        {"inputs": 0},
        {"inputs": True},
        {"inputs": 1 << 40, "outputs": 1 << 40},
        {"outputs": 16},
        {"rank": 0},
        {"rank": 9},
        {"structure": "full"},
        {"structure": "block_diagonal", "rank": 0, "groups": 3},
        {"groups": 2},
        {"stride": 0},
        {"stride": -1},
        {"clamped": 1},
        {"extra": 1},
    ],
)
def test_an_impossible_map_beside_a_block_is_refused(change):
    assert compensation_from_json("b", BESIDE).rank == 2
    with pytest.raises(CheckpointError, match=r"beside b|needs"):
        compensation_from_json("b", BESIDE | change)
    for missing in BESIDE:
        with pytest.raises(CheckpointError, match="must say"):
            compensation_from_json("b", {key: value for key, value in BESIDE.items() if key != missing})
