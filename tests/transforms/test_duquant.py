import json

import pytest
import torch

from bitmend.calibrate.dual_stream import DualStream
from bitmend.errors import CalibrationError, RecipeError
from bitmend.formats.ledger import ledger
from bitmend.models.hf_causal_lm import HfCausalLm
from bitmend.pipeline.run import quantize
from bitmend.protocols import TokenBatch
from bitmend.report.summary import ledger_rows
from bitmend.transforms.duquant import DuQuant, largest_divisor

BATCH = TokenBatch(torch.arange(3, 27).view(2, 12))


def opened(tiny, tmp_path, family="llama"):
    adapter = HfCausalLm.open(tiny.save(tmp_path / family, tiny.build(family)), dtype=torch.float64)
    streams = DualStream(adapter, [(BATCH, False)], device=torch.device("cpu"))
    adapter.load_block(0)
    block = adapter.describe_block(0, BATCH)
    return adapter, streams, block, adapter.wiring_of(block, BATCH)


def test_layers_with_the_same_input_share_a_rotation_and_the_product_stays(tiny, tmp_path):
    _, streams, block, wiring = opened(tiny, tmp_path)
    before = {site.path: site.weight(block.module).clone() for site in block.sites}
    inputs = DuQuant(block=8, steps=16).apply_(block, wiring, streams).inputs
    assert set(inputs) == set(before)
    assert inputs["self_attn.q_proj"] is inputs["self_attn.v_proj"]
    assert inputs["mlp.up_proj"] is inputs["mlp.gate_proj"]
    assert (inputs["mlp.down_proj"].size, inputs["mlp.down_proj"].block) == (24, 8)
    values = torch.randn(5, 16, dtype=torch.float64)
    for path in ("self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj"):
        new = block.module.get_submodule(path).weight
        assert torch.allclose(inputs[path].apply(values) @ new.T, values @ before[path].T)


def test_what_layers_read_has_lower_peaks(tiny, tmp_path):
    _, streams, block, wiring = opened(tiny, tmp_path)
    paths = ["self_attn.q_proj", "mlp.down_proj"]
    read = streams.some_inputs(block, paths, 24)
    inputs = DuQuant(block=8, steps=64, tokens=24).apply_(block, wiring, streams).inputs
    for path in paths:
        assert float(inputs[path].apply(read[path]).abs().max()) < 0.9 * float(read[path].abs().max())


def test_some_inputs_are_the_largest_and_an_even_choice(tiny, tmp_path):
    adapter, _, block, _ = opened(tiny, tmp_path)
    padded = TokenBatch(torch.arange(3, 27).view(2, 12), torch.tensor([[True] * 12, [True] * 5 + [False] * 7]))
    batches = [(padded, False), (BATCH, False), (BATCH, True)]
    streams = DualStream(adapter, batches, device=torch.device("cpu"))
    seen = []
    handle = block.module.mlp.down_proj.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    found = streams.some_inputs(block, ["mlp.down_proj"], 12)["mlp.down_proj"]
    handle.remove()
    tokens = torch.cat([seen[0].reshape(24, -1)[padded.mask.reshape(-1)], seen[1].reshape(24, -1)]).float()
    assert len(seen) == 2  # the held-out rows are left alone
    largest = tokens[tokens.abs().amax(1).argsort(descending=True, stable=True)[:6]]
    assert torch.equal(found[:6], largest)
    assert torch.equal(found[6:], tokens[:: 48 // 6])


def test_experts_that_no_token_reaches_stay_as_they_are(tiny, tmp_path):
    _, streams, block, wiring = opened(tiny, tmp_path, "mixtral")
    gate = block.module.mlp.gate
    with torch.no_grad():
        gate.weight.zero_()  # every token goes to the same two experts
    before = {path: block.module.get_submodule(path).weight.clone() for path in wiring.writers}
    inputs = DuQuant(block=8, steps=8).apply_(block, wiring, streams).inputs
    assert sum(path.endswith("w2") for path in inputs) == 2
    for path, weight in before.items():
        assert torch.equal(block.module.get_submodule(path).weight, weight) == (path not in inputs)
    assert sum(path.endswith("w1") for path in inputs) == 4  # these read what all experts read


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"block": 0}, "block must be at least 1"),
        ({"steps": 0}, "steps must"),
        ({"seed": -1}, "seed must be 0 or more"),
    ],
)
def test_impossible_keys_are_refused(keys, message):
    with pytest.raises(RecipeError, match=message):
        DuQuant(**keys)


def test_needs_rows(tiny, tmp_path):
    _, _, block, wiring = opened(tiny, tmp_path)
    with pytest.raises(CalibrationError, match="duquant needs calibration rows"):
        DuQuant().apply_(block, wiring, None)


def test_the_ledger_counts_what_config_json_takes_for_the_rotations(tiny, tmp_path):
    folder, text = tiny.save(tmp_path / "model", tiny.build()), tiny.write_text(tmp_path / "words.txt", 500)
    keys = {"weights.group_size": 8, "calibration.sequences": 4, "calibration.sequence_length": 12}
    for name, transforms in (("plain", []), ("rotated", [{"name": "duquant", "steps": 4, "force": True}])):
        quantize(folder, "gptq", [text], output=tmp_path / name, overrides={**keys, "transforms": transforms})
    plain, account = ledger(tmp_path / "plain"), ledger(tmp_path / "rotated")
    rotations = json.loads((tmp_path / "rotated" / "config.json").read_text())["quantization_config"]["rotations"]
    assert len(rotations) == 2 * 4  # two blocks, four inputs each
    assert account.rotation_bytes == len(json.dumps(rotations))
    extra = 8 * account.rotation_bytes
    assert account.bits_per_weight == pytest.approx(plain.bits_per_weight + extra / plain.quantised_weights)
    header = account.bits["header"] - plain.bits["header"]
    more = extra + 8 * (account.file_bytes - plain.file_bytes) - header
    assert account.bits_per_weight_model == pytest.approx(plain.bits_per_weight_model + more / plain.parameters)
    assert ["rotations in config.json", f"{account.rotation_bytes:,}", "beside it"] in ledger_rows(account)[1]
    assert account.to_json()["rotation_bytes"] == account.rotation_bytes


def test_largest_divisor():
    assert [largest_divisor(width, 128) for width in (4096, 11008, 768, 172, 127, 131)] == [128, 128, 128, 86, 127, 1]
