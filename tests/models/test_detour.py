import pytest
import torch
from torch import nn

from bitmend.errors import ModelError
from bitmend.models.detour import ReturnForm, candidate_lists, detour, first_reached, probe, split_hidden


class Expert(nn.Sequential):
    pass


class Layer(nn.Module):
    def __init__(self, experts=0):
        super().__init__()
        self.attention_type = "full"
        self.linear = nn.Linear(2, 2)
        self.experts = nn.ModuleList(Expert(nn.Linear(2, 2)) for _ in range(experts))

    def forward(self, hidden_states):
        return (self.linear(hidden_states), None)


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(2, 2) for _ in range(9))
        self.acts = nn.ModuleList(nn.ReLU() for _ in range(9))
        self.mixed = nn.ModuleList([Layer(), Expert(nn.Linear(2, 2)), Layer(), Layer(), Layer()])
        self.idle = nn.ModuleList(Expert(nn.Linear(2, 2)) for _ in range(4))
        self.layers = nn.ModuleList(Layer(experts=7) for _ in range(3))

    def forward(self, hidden):
        for layer in self.layers:
            assert layer.attention_type == "full"
            hidden = layer(hidden_states=hidden)[0]
        return hidden


def test_candidates_are_outermost_of_one_class_and_hold_sites():
    assert [one.name for one in candidate_lists(Stack())] == ["idle", "layers"]


def test_the_list_that_runs_is_found():
    model = Stack()
    found = first_reached(candidate_lists(model), lambda: model(torch.ones(1, 2)))
    assert found is not None
    assert found.names == ("layers.0", "layers.1", "layers.2")
    assert first_reached(candidate_lists(model), lambda: None) is None


def test_probe_sees_the_form_and_the_order():
    model = Stack()
    x = torch.ones(1, 2)
    seen = probe(list(model.layers), lambda: model(x))
    assert seen.form == ReturnForm(2)
    assert seen.order == (0, 1, 2)
    assert torch.equal(seen.first_output, model.layers[0](x)[0])


def test_detour_puts_everything_back():
    model = Stack()
    model.layers[1].forward = own = lambda hidden_states: (hidden_states * 2, None)

    def fail(index, args, kwargs):
        raise KeyError(index)

    with pytest.raises(KeyError, match="0"), detour(list(model.layers), fail):
        model(torch.ones(1, 2))
    assert "forward" not in model.layers[0].__dict__
    assert model.layers[1].__dict__["forward"] is own


def test_return_form():
    x = torch.ones(1)
    assert ReturnForm.of(x).wrap(x) is x
    assert ReturnForm.of((x, 1, 2)).wrap(x) == (x, None, None)
    assert ReturnForm.unwrap((x, 1)) is x
    with pytest.raises(ModelError, match="a block returned dict, need a tensor or a tuple"):
        ReturnForm.of({"hidden": x})


def test_hidden_states_by_position_or_by_name():
    x = torch.ones(1)
    assert split_hidden((x, 1), {"a": 2}) == (x, (1,), {"a": 2})
    assert split_hidden((), {"hidden_states": x, "a": 2}) == (x, (), {"a": 2})
