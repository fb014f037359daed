"""Keys and values in front of every text: the model with a prefix is the model behind the same tokens."""

import inspect
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from bitmend.calibrate.data import Split, load_calibration
from bitmend.errors import CheckpointError, ModelError, RecipeError, RequestError
from bitmend.formats.ledger import ledger
from bitmend.models.hf_causal_lm import HfCausalLm
from bitmend.models.tokenizer import load_tokenizer
from bitmend.online import PrefixShape
from bitmend.pipeline.prefix import Prefix, choose_prefix, first_token_of
from bitmend.pipeline.recipe import PrefixSection
from bitmend.protocols import SilentProgress, TokenBatch
from bitmend.runtime.packed_cache import cache_option

TOKENS = [7, 1, 4]
W8 = {"weights.bits": 8, "weights.group_size": 4}
PREFIX = {"prefix.tokens": TOKENS}
IDS = torch.arange(3, 43).view(2, 20)
CPU = torch.device("cpu")


def logits(model, ids=IDS, **options):
    with torch.no_grad():
        return model(ids, **options).logits


def cache_name(model):
    return [next(name for name in ("cache", "past_key_values") if name in inspect.signature(model.forward).parameters)]


def behind(model, ids=IDS):
    """What a model gives for a text that stands behind the tokens."""
    front = torch.tensor(TOKENS).expand(len(ids), -1)
    return logits(model, torch.cat([front, ids], 1))[:, len(TOKENS) :]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "mixtral", "neox"])
def test_nothing_else_changes(run_tiny, tiny, tmp_path, family):
    """At 8 bits the weights hardly move: the loaded model gives what the original gives behind the same tokens."""
    changes = {"sliding_window": 64} if family == "gemma2" else {}
    folder = tiny.save(tmp_path / "model", tiny.build(family, **changes))
    run_tiny(model=folder, recipe="rtn", keys={**W8, **PREFIX})
    model, original = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), tiny.build(family, **changes)
    wanted, plain = behind(original), logits(original)
    error = float((logits(model) - wanted).norm() / wanted.norm())
    assert error < 0.05
    assert float((plain - wanted).norm() / wanted.norm()) > 3 * error  # the prefix does matter


def test_the_whole_run_is_measured_against_the_full_precision_model_behind_it(run_tiny, tiny, tiny_model, tmp_path):
    report = run_tiny(keys={**W8, **PREFIX, "kv_cache.bits": 8, "activations.bits": 8})
    assert report.blocks[-1].relative_error < 1e-3
    assert [event.message for event in report.events if event.kind == "prefix"] == [
        "3 tokens of the recipe stand in front"
    ]


@pytest.mark.parametrize("keys", [{}, {"kv_cache.bits": 4}, {"kv_cache.bits": 4, "kv_cache.rotate": False}], ids=str)
def test_caches_and_padding_know_nothing_of_it(run_tiny, tmp_path, keys):
    run_tiny(keys={**W8, **PREFIX, **keys})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    whole = logits(model)
    packed = cache_option(model) if keys else dict.fromkeys(cache_name(model), DynamicCache(config=model.config))
    parts = [logits(model, IDS[:, start:stop], **packed) for start, stop in ((0, 7), (7, 8), (8, 20))]
    assert torch.isclose(torch.cat(parts, 1), whole, atol=1e-4).float().mean() > 0.95
    asked = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(IDS, use_cache=False, **asked), model.generate(IDS, **asked))
    # Padding on the right, and on the left with its positions.
    mask = torch.ones(1, 8, dtype=torch.long)
    mask[:, 5:] = 0
    assert torch.allclose(logits(model, IDS[:1, :8], attention_mask=mask)[:, :5], logits(model, IDS[:1, :5]), atol=1e-5)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), IDS[:1, :5]], 1)
    positions = torch.tensor([[0, 0, 0, 0, 1, 2, 3, 4]])
    got = logits(model, padded, attention_mask=mask.flip(1), position_ids=positions)[:, 3:]
    assert torch.allclose(got, logits(model, IDS[:1, :5]), atol=1e-5)


@pytest.mark.parametrize("keys", [{}, {"attention.probability_bits": 8}], ids=str)
def test_a_cache_of_fixed_length(run_tiny, tmp_path, keys):
    """It has room for more tokens than have come, which nobody may look at."""
    run_tiny(keys={**W8, **PREFIX, **keys})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    cache = dict.fromkeys(cache_name(model), StaticCache(config=model.config, max_cache_len=32))
    parts = [logits(model, IDS[:, start:stop], **cache) for start, stop in ((0, 7), (7, 8), (8, 20))]
    assert torch.isclose(torch.cat(parts, 1), logits(model), atol=1e-4).float().mean() > 0.95


def test_a_run_without_rows_goes_on_with_the_prefix(ends_alike, tiny, tmp_path):
    folder = tiny.save(tmp_path / "model", tiny.build("llama", num_hidden_layers=3))
    # After 16 sites the third block has begun.
    ends_alike(16, model=folder, recipe="rtn", keys={**W8, **PREFIX}, calibration=())


def test_the_folder_holds_it_and_saves_it_again(run_tiny, tmp_path):
    run_tiny(keys={**W8, **PREFIX})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    attentions = model.hf_quantizer.quantization_config.manifest.attentions
    assert {one.prefix for one in attentions.values()} == {PrefixShape(3, 2, 4, 4)}
    assert set(attentions) == {f"model.layers.{index}.self_attn" for index in range(2)}
    # Two blocks, keys and values, 2 heads, 3 tokens, 4 features of 4 bytes.
    rows = {row.name: sum(row.bits.values()) for row in ledger(tmp_path / "out").rows}
    assert sum(bits for name, bits in rows.items() if name.endswith("self_attn")) == 8 * 2 * 2 * 2 * 3 * 4 * 4
    assert ledger(tmp_path / "out").online["keys and values of 3 tokens before all others"] == 2
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits(model))


def test_resume_is_bit_identical(ends_alike):
    keys = {**PREFIX, "weights.bits": 3, "activations.bits": 4, "transforms": [{"name": "quarot", "force": True}]}
    for k in (3, 9):
        ends_alike(k, output=f"out{k}", keys=keys)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_models_that_add_positions_to_tokens_are_refused(run_tiny, tiny, tmp_path, family):
    folder = tiny.save(tmp_path / "model", tiny.build(family))
    with pytest.raises(ModelError, match="adds an embedding of the position to each token; leave the prefix out"):
        run_tiny(model=folder, keys={**W8, **PREFIX})
    assert not (tmp_path / "out").exists()


def test_a_block_that_knows_where_a_text_begins_is_refused(tiny_model):
    """Keys that do not stand where they should: the proof at the block finds it."""
    adapter = HfCausalLm.open(tiny_model)
    adapter.prepare_attention_()
    prefix = Prefix(adapter, TOKENS)
    prefix.begin_()
    prefix._inputs = adapter.block_inputs(TokenBatch(torch.tensor([TOKENS]), first_position=5))
    adapter.load_block(0)
    with pytest.raises(ModelError, match="so that its positions are not relative; leave the prefix out"):
        prefix.enter_(adapter.describe_block(0, adapter.few_rows()))


def test_a_sliding_window_hides_nothing_of_the_prefix(run_tiny, tiny, tmp_path):
    folder = tiny.save(tmp_path / "model", tiny.build("mistral"))  # a window of four tokens
    run_tiny(model=folder, recipe="rtn", keys={**W8, **PREFIX})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    kept = model.model.layers[1].self_attn.prefix_value
    before = logits(model)
    kept.mul_(2)
    assert bool((logits(model) != before).any(-1).all())
    with pytest.raises(ModelError, match="a prefix must be shorter than the model's sliding window of 4 tokens; got 4"):
        run_tiny(model=folder, recipe="rtn", keys={**W8, "prefix.tokens": [1, 2, 3, 4]}, output="other")


@pytest.mark.parametrize("token", [-1, 61])
def test_tokens_must_be_of_the_vocabulary(run_tiny, token):
    with pytest.raises(RecipeError, match=rf"prefix\.tokens must be numbers of tokens, from 0 to 60; got {token}"):
        run_tiny(keys={"prefix.tokens": [1, token]})


def test_a_prefix_and_a_row_must_fit_into_the_context(run_tiny, tiny, tmp_path):
    folder = tiny.save(tmp_path / "model", tiny.build("llama", max_position_embeddings=14))
    with pytest.raises(RequestError, match="context of 14 tokens, of which a prefix may take 3; got 12"):
        run_tiny(model=folder, keys=PREFIX)
    with pytest.raises(RequestError, match="a prefix of 14 tokens leaves nothing of the model's context of 14 tokens"):
        run_tiny(model=folder, keys={"prefix.tokens": [1] * 14})


# ------------------------------------------------------------------------------------------------ which tokens
def choose(tiny_model, rows, patch, **section):
    adapter = HfCausalLm.open(tiny_model)
    patch(adapter)
    batches = [(TokenBatch(rows), False)]
    asked = {"progress": SilentProgress(), "device": CPU, "directory": None, "trace": adapter.few_rows()}
    return choose_prefix(adapter, PrefixSection(**section), batches, 1, asked.pop("progress"), **asked)


def test_tokens_with_massive_activations_are_found(tiny_model):
    rows = torch.randint(8, 57, (12, 30), generator=torch.Generator().manual_seed(0))
    rows[:, 0], rows[:, 11], rows[::2, 20], rows[0, 25] = 5, 58, 59, 60

    def patch(adapter):
        def hook(module, arguments):
            values = arguments[0]
            if values.shape[:2] != rows.shape:
                return None
            loud = torch.isin(rows, torch.tensor([5, 58, 59, 60])).unsqueeze(-1)
            return (torch.where(loud, values * 1e4, values),)

        adapter.model.model.layers[1].mlp.down_proj.register_forward_pre_hook(hook)

    # Each row has two or three: 5 in front, 58, and 59 in every second; 60 is too rare.
    tokens, event = choose(tiny_model, rows, patch)
    assert tokens == (58, 59, 1)
    assert event.kind == "prefix"
    assert choose(tiny_model, rows, patch, max_tokens=2)[0] == (58, 1)
    assert choose(tiny_model, rows, patch, threshold=1e9)[0] == ()


def test_where_there_are_none_nothing_stands_in_front(run_tiny, tmp_path):
    report = run_tiny(keys={**W8, "prefix.max_tokens": 2})
    (event,) = [event for event in report.events if event.kind == "no_prefix"]
    assert event.message == "no token has activations 64 times those of others, so nothing stands in front"
    assert (
        AutoModelForCausalLM.from_pretrained(tmp_path / "out").hf_quantizer.quantization_config.manifest.attentions
        == {}
    )


def test_the_first_token_is_that_of_the_config(tiny_model):
    config = HfCausalLm.open(tiny_model).model.config
    config.bos_token_id, config.eos_token_id = None, 9
    assert first_token_of(config) == 9
    config.bos_token_id = 4
    assert first_token_of(config) == 4
    config.bos_token_id = config.eos_token_id = None
    assert first_token_of(config) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda prefix: prefix.update(tokens=0), "must have a prefix of 1 to"),
        (lambda prefix: prefix.update(tokens=1 << 40), "must have a prefix of 1 to"),
        (lambda prefix: prefix.update(heads=True), "to be of type int"),
        (lambda prefix: prefix.pop("heads"), "must say tokens, heads, key_width, value_width of a prefix"),
        (lambda prefix: prefix.update(tokens=2), "has the shape"),
        (lambda prefix: prefix.update(heads=1), "a prefix of 1 heads at model.layers.0.self_attn, which has 2"),
        (lambda prefix: prefix.update(key_width=8), "a prefix of 8 features of a key at .*, which has 4"),
    ],
)
def test_a_folder_that_says_something_else_is_refused(run_tiny, tmp_path, change, message):
    run_tiny(keys={**W8, **PREFIX})
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"]["attentions"]["model.layers.0.self_attn"]["prefix"])
    del config["quantization_config"]["seal"]
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_everything_at_once_as_in_the_recipe(run_tiny, ends_alike, tiny_model, tiny_text, tiny, tmp_path):
    """Static ranges, searched ratios, a cache, rotations and a prefix: what is solved for is what runs, also gone on with."""
    keys = {
        **PREFIX,
        "weights.bits": 8,
        "weights.group_size": -1,
        "activations": {"bits": 6, "static": True, "clip_ratio": "search"},
        "kv_cache": {"bits": 6, "symmetric": True, "static": True, "clip_ratio": "search"},
        "transforms": [{"name": "smooth", "force": True}, {"name": "quarot", "force": True}],
    }
    report = run_tiny("whole", keys=keys)
    ends_alike(9, keys=keys)
    model, original = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), tiny.build("llama")
    rows = load_calibration(
        [tiny_text], load_tokenizer(tiny_model), sequences=8, sequence_length=12, held_out=0.25, seed=0
    )
    splits = zip(rows.batches(1), rows.split_of_batch(1), strict=True)
    held_out = torch.cat([row.ids for row, split in splits if split is Split.HELD_OUT])
    wanted = behind(original, held_out)
    error = float((logits(model, held_out) - wanted).square().sum() / wanted.square().sum())
    assert error < 10 * report.blocks[-1].relative_error < 0.1
    assert error < 0.5 * float((logits(original, held_out) - wanted).square().sum() / wanted.square().sum())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_sixteen_bits(run_tiny, tiny, tmp_path, dtype):
    folder = tiny.save(tmp_path / "model", tiny.build("llama", dtype))
    run_tiny(model=folder, keys={**W8, **PREFIX, "activations.bits": 8, "activations.static": True})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.model.layers[0].self_attn.prefix_key.dtype == dtype
    wanted = behind(tiny.build("llama").float())
    assert float((logits(model).float() - wanted).norm() / wanted.norm()) < 0.1
