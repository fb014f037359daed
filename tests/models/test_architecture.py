import pytest
import transformers
from torch import nn

from bitmend.errors import ModelError
from bitmend.models.architecture import (
    architecture_name,
    module_lists,
    modules_found,
    refuse_quantised,
    why_not_causal,
)


def test_the_name_is_the_class_that_wrote_the_model():
    assert architecture_name(transformers.LlamaConfig(architectures=["LlamaForCausalLM"])) == "LlamaForCausalLM"
    assert architecture_name(transformers.LlamaConfig()) == "llama"


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (transformers.LlamaConfig(architectures=["LlamaForCausalLM"]), None),
        (transformers.LlamaConfig(), None),
        (transformers.GPT2Config(architectures=["GPT2LMHeadModel"]), None),
        (transformers.T5Config(), "it is an encoder-decoder model"),
        (transformers.ViTConfig(), "it is not a causal language model"),
        (
            transformers.LlamaConfig(architectures=["LlamaForSequenceClassification"]),
            "it is not a causal language model",
        ),
    ],
)
def test_causal_language_models_are_told_from_others(config, reason):
    assert why_not_causal(config) == reason


def test_codes_are_not_quantised_again(tmp_path):
    refuse_quantised(transformers.LlamaConfig(), tmp_path)
    config = transformers.LlamaConfig(quantization_config={"quant_method": "gptq"})
    with pytest.raises(ModelError, match=r"is quantised already \(quant_method 'gptq'\), need full-precision weights"):
        refuse_quantised(config, tmp_path)


def test_outermost_module_lists_are_named():
    inner = nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(2, 2)])})
    model = nn.ModuleDict({"layers": nn.ModuleList([inner, inner]), "norms": nn.ModuleList([nn.LayerNorm(2)])})
    assert module_lists(model) == "layers (2 x ModuleDict), norms (1 x LayerNorm)"
    assert module_lists(nn.Linear(2, 2)) == "no module list"


def test_what_an_architecture_is_made_of_is_said_without_its_weights():
    config = transformers.ViTConfig(
        architectures=["ViTModel"], num_hidden_layers=3, hidden_size=8, num_attention_heads=2
    )
    assert "3 x ViTLayer" in modules_found(config)
    assert (
        modules_found(transformers.LlamaConfig(architectures=["NoSuchModel"]))
        == "its modules are unknown to transformers"
    )


@pytest.mark.parametrize("named", [3, "LlamaForCausalLM", [3], {"a": 1}])
def test_classes_that_are_named_wrongly_are_not_named(named):
    config = transformers.LlamaConfig()
    config.architectures = named
    assert architecture_name(config) == "llama"
    assert why_not_causal(config) is None
