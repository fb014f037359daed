"""The contracts, and that what is registered keeps them."""

import dataclasses
import inspect

import pytest
import torch
import transformers

from bitmend import protocols
from bitmend.calibrate.activation_store import ActivationStore
from bitmend.models.cifar_resnet import CifarResNetConfig, CifarResNetForImageClassification
from bitmend.models.hf_causal_lm import HfCausalLm
from bitmend.models.hf_image import HfImage
from bitmend.models.hf_text_encoder import HfTextEncoder
from bitmend.numerics.observers import choose_qparams
from bitmend.numerics.qtensor import QuantSpec
from bitmend.numerics.uniform import UniformGrid
from bitmend.protocols import (
    ADAPTERS,
    COMPENSATORS,
    FORMATS,
    REPARAMETERISATIONS,
    SOLVERS,
    TRANSFORMS,
    CheckpointFormat,
    ChoosingSolver,
    Compensator,
    Event,
    LearningTransform,
    ModelAdapter,
    ModelTransform,
    Need,
    Problem,
    Progress,
    Reparameterisation,
    SilentProgress,
    SiteSolver,
    TokenBatch,
    Transform,
)
from bitmend.sites import LinearSite

CONTRACTS = (
    (SOLVERS, SiteSolver, "solve"),
    (TRANSFORMS, Transform, "apply_"),
    (COMPENSATORS, Compensator, "fit"),
    (REPARAMETERISATIONS, Reparameterisation, "parameterise"),
    (FORMATS, CheckpointFormat, "export"),
)
PARTS = [
    pytest.param(entry.part, contract, method, id=f"{registry.kind}-{entry.name}")
    for registry, contract, method in CONTRACTS
    for entry in registry
]


@pytest.mark.parametrize(("part", "contract", "method"), PARTS)
def test_a_registered_part_keeps_its_contract(part, contract, method):
    assert dataclasses.is_dataclass(part)
    assert part.__dataclass_params__.frozen
    assert isinstance(part(), contract)  # its defaults are enough
    wanted, found = (list(inspect.signature(getattr(kind, method)).parameters) for kind in (contract, part))
    assert found == wanted


@pytest.mark.parametrize(("part", "contract", "method"), PARTS)
def test_a_part_has_one_public_method_and_says_what_it_does(part, contract, method):
    public = [name for name in dir(part) if callable(getattr(part, name)) and not name.startswith("_")]
    # What it costs a solver may tell, for the forecast, and one that makes choices on held-out rows must be able to keep to
    # them; a transform may change what lies around the blocks; a compensator tells its largest map, for the forecast.
    more = {"residual_rotation", "apply_to_ends_"} if isinstance(part(), ModelTransform) else {"cost"}
    if isinstance(part(), LearningTransform):
        more = more | {"learn", "with_learned"}
    if isinstance(part(), Compensator):
        more = more | {"largest"}
    if Need.HELD_OUT in getattr(part, "needs", ()):
        assert isinstance(part(), ChoosingSolver)
        more = more | {"solve_again"}
    assert [name for name in public if name not in more] == [method]
    assert part.__doc__.partition("\n")[0].endswith(".")


def test_solvers_ask_for_known_needs():
    for entry in SOLVERS:
        assert isinstance(entry.part.needs, frozenset)
        assert entry.part.needs <= set(Need)


def test_an_adapter_keeps_its_contract(tiny_model):
    assert [entry.part for entry in ADAPTERS] == [HfCausalLm, HfImage, HfTextEncoder]
    assert isinstance(HfCausalLm.open(tiny_model), ModelAdapter)


def test_an_adapter_of_pictures_keeps_its_contract(tmp_path):
    config = CifarResNetConfig(blocks_per_stage=1, stage_channels=[2, 2, 2], image_size=8)
    CifarResNetForImageClassification(config).save_pretrained(tmp_path)
    assert isinstance(HfImage.open(tmp_path), ModelAdapter)


def test_an_adapter_of_an_encoder_keeps_its_contract(tmp_path):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    transformers.BertModel(transformers.BertConfig(vocab_size=9, **sizes)).save_pretrained(tmp_path)
    assert isinstance(HfTextEncoder.open(tmp_path), ModelAdapter)


def test_a_store_may_be_read_twice():
    store = ActivationStore()
    store.append(torch.ones(1, 2, 3))
    assert [len(list(store)) for _ in range(2)] == [1, 1]


def test_contracts_can_be_broken():
    assert not isinstance(object(), SiteSolver)
    assert not isinstance(SilentProgress(), SiteSolver)


def test_silence():
    progress = SilentProgress()
    assert isinstance(progress, Progress)
    assert list(progress.track(iter([3, 4]), "work", 2)) == [3, 4]
    assert progress.say("nothing") is None


def test_silence_prints_nothing(capsys):
    list(SilentProgress().track([1], "work", 1))
    SilentProgress().say("x")
    assert capsys.readouterr() == ("", "")


def test_num_tokens_counts_real_tokens_only():
    ids = torch.zeros(2, 5, dtype=torch.int64)
    assert TokenBatch(ids).num_tokens == 10
    mask = torch.arange(5)[None] < torch.tensor([[5], [2]])
    assert TokenBatch(ids, mask).num_tokens == 7


def test_an_event_does_not_degrade_unless_it_says_so():
    assert not Event("dead_columns", "here", "two inputs were zero").degrades


def test_scales_of_a_problem_are_searched_once_and_follow_its_weight(monkeypatch):
    searched = []

    def search(weight, spec):
        searched.append(weight)
        return choose_qparams(weight, spec)

    monkeypatch.setattr(protocols, "choose_qparams", search)
    spec = QuantSpec(UniformGrid(3, symmetric=True))
    first = Problem(LinearSite("a", "a", "linear", (2, 8)), torch.randn(2, 8), spec)
    copied = dataclasses.replace(first, fit=None)
    assert copied.qparams() is first.qparams()
    assert len(searched) == 1
    other = dataclasses.replace(first, weight=2 * first.weight)
    torch.testing.assert_close(other.qparams().scale, 2 * first.qparams().scale)
    finer = dataclasses.replace(first, spec=QuantSpec(UniformGrid(4, symmetric=True)))
    assert (finer.qparams().scale < first.qparams().scale).all()
    assert len(searched) == 3
