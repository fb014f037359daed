"""A tokenizer whose tokens are its words: "w7" is token 7."""

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

TEMPLATE = "{% for message in messages %}w98 {{ message.content }} {% endfor %}"


@pytest.fixture(scope="session")
def words():
    vocabulary = {f"w{number}": number for number in range(99)} | {"</s>": 99}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="w0")
    wrapped.chat_template = TEMPLATE
    return wrapped
