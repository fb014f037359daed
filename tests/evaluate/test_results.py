import json
import math

from bitmend.evaluate.results import EvaluationReport, ModelResult, TextResult


def make(**changes):
    fields = {
        "file": "a.txt",
        "windows": 2,
        "window_length": 4,
        "perplexity": 3.5,
        "reference_perplexity": None,
        "kl": None,
        "top1_agreement": None,
        "kl_standard_error": None,
        "kl_p90": None,
        "kl_p99": None,
        "kl_p999": None,
        "cross_entropy": 1.25,
        "tokens": 8,
        "tokens_sha256": "00",
        "seconds": 0.5,
    }
    result = TextResult(**{**fields, **changes})
    return EvaluationReport((ModelResult("m", (result,)),), None, "float32", "cpu")


def test_json_has_the_promised_form():
    report = json.loads(make(kl=0.25).to_json())
    (model,) = report["models"]
    assert model["model"] == "m"
    (text,) = model["texts"]
    assert {"file", "windows", "window_length", "perplexity", "kl", "top1_agreement"} <= text.keys()
    assert (text["perplexity"], text["kl"], text["top1_agreement"]) == (3.5, 0.25, None)
    assert report["reference"] is None


def test_what_json_cannot_hold_becomes_null():
    assert json.loads(make(perplexity=math.inf).to_json())["models"][0]["texts"][0]["perplexity"] is None
