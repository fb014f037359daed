import json

import pytest

from bitmend.errors import ModelError
from bitmend.models.tokenizer import load_tokenizer


def test_it_reads_the_tokenizer_of_a_folder(tiny_model):
    assert load_tokenizer(tiny_model)("w7 w60")["input_ids"] == [7, 60]


@pytest.mark.parametrize("broken", [None, "{", '{"version": "1.0"}'])
def test_a_folder_without_a_readable_tokenizer(tmp_path, broken):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    if broken is not None:
        (tmp_path / "tokenizer.json").write_text(broken)
    sentence = r"a tokenizer is required to read text, but it could not be loaded \(.+\); copy the tokenizer files"
    with pytest.raises(ModelError, match=sentence) as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_settings_that_only_work_would_show_are_tried(tiny, tmp_path):
    folder = tmp_path / "model"
    tiny.tokenizer().save_pretrained(folder)
    assert len(load_tokenizer(folder)) == tiny.vocabulary
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": {"a": 1}}))
    with pytest.raises(ModelError, match=r"could not be loaded \('>' not supported .*\); copy the tokenizer files of"):
        load_tokenizer(folder)
