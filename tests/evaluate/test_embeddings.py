import json

import pytest
import torch
import transformers
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from bitmend.errors import ModelError, NumericsError, RequestError
from bitmend.evaluate.embeddings import SentencePairs, embed_pairs, embed_texts, read_pairs, score_pairs
from bitmend.evaluate.evaluate import evaluate
from bitmend.evaluate.load import LoadedModel
from bitmend.protocols import SilentProgress

QUIET = SilentProgress()


class Words(nn.Module):
    """Its states are (number of the word, position + 1), whatever the mask says."""

    def __init__(self, angle=0.0):
        super().__init__()
        self.angle = angle
        self.config = transformers.BertConfig(max_position_embeddings=6)
        self.device, self.dtype = torch.device("cpu"), torch.float32

    def forward(self, input_ids, attention_mask):
        assert attention_mask.shape == input_ids.shape
        position = torch.arange(1.0, input_ids.shape[1] + 1).expand(input_ids.shape)
        return BaseModelOutput(last_hidden_state=torch.stack([input_ids + self.angle * position, position], -1))


@pytest.fixture
def tokenizer(tiny):
    return tiny.tokenizer()


@pytest.fixture
def model(tokenizer):
    return LoadedModel("words", Words().eval(), tokenizer, gives="embeddings")


def pairs(*sentences, scores=None):
    return SentencePairs("pairs", sentences, scores, "")


def test_states_are_averaged_over_the_tokens_of_a_text_alone(model):
    # Both texts run in one batch, so that the first is padded.
    found = embed_texts(model, ["w5 w7", "w9 w9 w9 w30"], 2, QUIET, "")
    assert found.tolist() == [[6.0, 1.5], [57 / 4, 2.5]]


def test_order_and_batches_do_not_matter(model):
    texts = ["w5 w7", "w9", "w3 w4 w8", "w30 w31"]
    alone = torch.cat([embed_texts(model, [text], 1, QUIET, "") for text in texts])
    assert torch.equal(embed_texts(model, texts, 3, QUIET, ""), alone)


def test_texts_are_cut_to_the_context(model):
    assert embed_texts(model, ["w5 " * 20], 1, QUIET, "").tolist() == [[5.0, 3.5]]


@pytest.mark.parametrize(("key", "expected"), [("cls_token", [5.0, 1.0]), ("mean_tokens", [6.0, 1.5])])
def test_a_pooling_file_of_sentence_transformers_counts(model, tmp_path, key, expected):
    (tmp_path / "1_Pooling").mkdir()
    content = {"word_embedding_dimension": 2, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": False}
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(content | {f"pooling_mode_{key}": True}))
    pooled = LoadedModel("pooled", model.model, model.tokenizer, gives="embeddings", folder=tmp_path)
    assert embed_texts(pooled, ["w5 w7"], 1, QUIET, "").tolist() == [expected]


@pytest.mark.parametrize("content", ['{"pooling_mode_max_tokens": true}', "[]", "{", "{}"])
def test_another_pooling_is_refused(model, tmp_path, content):
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(content)
    pooled = LoadedModel("pooled", model.model, model.tokenizer, gives="embeddings", folder=tmp_path)
    with pytest.raises(ModelError, match=r"config\.json"):
        embed_texts(pooled, ["w5 w7"], 1, QUIET, "")


def test_scores_by_hand(model):
    # One word w at place 1 is (w, 1): its angle falls with w, and the cosine of a pair is that of the difference.
    asked = pairs(("w3", "w3"), ("w3", "w4"), ("w3", "w50"), scores=(5.0, 3.0, 4.0))
    found = score_pairs(model, asked, batch_size=2, reference=embed_pairs(model, asked, 2, QUIET), progress=QUIET)
    assert (found.count, found.similarity, found.rank_correlation) == (6, pytest.approx(1), pytest.approx(1))
    # Ranks of the cosines 3, 2, 1, of the scores 3, 1, 2: 1 - 6 (0 + 1 + 1) / (3 * 8) = 0.5.
    assert found.score_correlation == found.reference_score_correlation == pytest.approx(0.5)


def test_a_network_that_differs_is_told(model, tokenizer):
    asked = pairs(("w3", "w9"), ("w3", "w4"), ("w3", "w50"))
    reference = embed_pairs(model, asked, 2, QUIET)
    other = LoadedModel("other", Words(angle=-4.0).eval(), tokenizer, gives="embeddings")
    found = score_pairs(other, asked, batch_size=2, reference=reference, progress=QUIET)
    vectors = torch.tensor([[w, 1.0] for w in (3, 9, 3, 4, 3, 50)], dtype=torch.float64)
    turned = vectors - torch.tensor([4.0, 0.0])
    cosines = torch.nn.functional.cosine_similarity(vectors, turned, dim=-1)
    assert found.similarity == pytest.approx(float(cosines.mean()))
    assert found.similarity_low == pytest.approx(float(cosines.quantile(0.01)))
    # Cosines of 3 with 9, 4 and 50 fall in the order 4, 9, 50; those of -1 with 5, 0 and 46 are highest for 0 as well, and
    # then for 5: (-1, 1) is turned from (0, 1) by 45 degrees, from (5, 1) by 124, from (46, 1) by 134.
    assert found.rank_correlation == pytest.approx(1)
    assert found.score_correlation is None


def test_what_has_no_rank_has_no_correlation(model):
    asked = pairs(("w3", "w9"), ("w3", "w9"), scores=(1.0, 2.0))
    assert score_pairs(model, asked, batch_size=2, reference=None, progress=QUIET).score_correlation is None


def test_nothing_to_compare_with_is_refused(model):
    with pytest.raises(RequestError, match="pairs without scores can only be compared with a reference"):
        score_pairs(model, pairs(("w3", "w9")), batch_size=2, reference=None, progress=QUIET)


def test_embeddings_of_another_size_and_not_finite_ones_are_refused(model, tokenizer):
    asked = pairs(("w3", "w9"), ("w4", "w9"))
    with pytest.raises(RequestError, match="of the reference's 3 features are required, but its own have 2"):
        score_pairs(model, asked, batch_size=2, reference=torch.ones(2, 2, 3), progress=QUIET)
    broken = LoadedModel("broken", Words(angle=float("nan")).eval(), tokenizer, gives="embeddings")
    with pytest.raises(NumericsError, match="broken: finite embeddings are required"):
        embed_texts(broken, ["w5"], 1, QUIET, "")


def test_files_of_pairs(tmp_path):
    (tmp_path / "a.tsv").write_text("one\ttwo\t1.5\n\nthree\tfour\t2\n")
    (tmp_path / "b.tsv").write_text("one\ttwo\n")
    (tmp_path / "c.jsonl").write_text('{"sentence1": "one", "sentence2": "two", "score": 3}\n')
    assert read_pairs(tmp_path / "a.tsv").sentences == (("one", "two"), ("three", "four"))
    assert read_pairs(tmp_path / "a.tsv").scores == (1.5, 2.0)
    assert read_pairs(tmp_path / "b.tsv").scores is None
    assert read_pairs(tmp_path / "c.jsonl").scores == (3.0,)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.tsv",
            "one two\n",
            "line 1: two sentences and perhaps a score, with tabs between them, are required, but 1 col",
        ),
        ("a.tsv", "one\ttwo\tx\n", "line 1: a number is required as score, but 'x' came"),
        ("a.tsv", "one\ttwo\tnan\n", "line 1: a finite number is required"),
        ("a.tsv", "one\ttwo\none\ttwo\t1\n", "some lines have a score and some have none"),
        ("a.tsv", "one\t \n", "line 1: two sentences"),
        ("a.tsv", "", "it has no line"),
        ("a.jsonl", "{\n", "line 1: one JSON object a line is required"),
        ("a.jsonl", '{"sentence1": "one"}\n', "the keys sentence1 and sentence2 with text are required"),
        ("a.jsonl", "[1]\n", "the keys sentence1 and sentence2"),
        ("a.jsonl", "[" * 100_000 + "\n", "line 1: one JSON object a line is required"),
        (
            "a.jsonl",
            '{"sentence1": "a", "sentence2": "b", "score": 1' + "0" * 400 + "}\n",
            "line 1: a number is required",
        ),
        ("a.jsonl", '{"sentence1": "\\ud800", "sentence2": "b"}\n', "half of a character"),
    ],
)
def test_broken_files_of_pairs(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(RequestError, match=message):
        read_pairs(tmp_path / name)


def test_missing_and_foreign_files_of_pairs(tmp_path):
    with pytest.raises(RequestError, match="there is none; check the path"):
        read_pairs(tmp_path / "none.tsv")
    (tmp_path / "latin.tsv").write_bytes(b"caf\xe9\ttea\n")
    with pytest.raises(RequestError, match="UTF-8 text is required, but byte 3 is not"):
        read_pairs(tmp_path / "latin.tsv")


def test_a_language_model_is_no_encoder(tiny_model, tmp_path):
    (tmp_path / "a.tsv").write_text("w5\tw6\t1\nw7\tw8\t2\n")
    with pytest.raises(RequestError, match="an encoder is required to embed sentences, but it is a language model"):
        evaluate([tiny_model], pairs=[tmp_path / "a.tsv"])


def test_an_encoder_has_no_perplexity(tiny, tiny_text, tmp_path):
    config = transformers.BertConfig(
        vocab_size=61, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    folder = tiny.save(tmp_path / "bert", transformers.BertModel(config))
    with pytest.raises(
        RequestError, match="a language model is required to score windows of text, but it is an encoder"
    ):
        evaluate([folder], texts=[tiny_text])


def test_a_tokenizer_that_pads_on_the_left_is_turned(model):
    model.tokenizer.padding_side = "left"
    found = embed_texts(model, ["w5 w7", "w9 w9 w9 w30"], 2, QUIET, "")
    assert found.tolist() == [[6.0, 1.5], [57 / 4, 2.5]]
