"""Tiny word-level tokenizers, built without any file."""

from collections.abc import Callable

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

WORDS = ["<pad>", "<bos>", "<eos>", "<unk>", "<user>", "<assistant>", *"abcdefghij"]
"""Ids 0 to 15 in this order; `a` is 6."""
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system messages') }}{% endif %}"
    " <{{ m.role }}>{% if 'name' in m %} named {{ m.name }}{% endif %} {{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %} <assistant>{% endif %}"
)

MakeTokenizer = Callable[..., PreTrainedTokenizerFast]


@pytest.fixture(scope="session")
def make_tokenizer() -> MakeTokenizer:
    """make_tokenizer(wrap="$A" | "<bos> $A" | ..., chat=bool): a tokenizer that adds those special tokens."""

    def make(wrap: str = "$A", *, chat: bool = False) -> PreTrainedTokenizerFast:
        core = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
        core.pre_tokenizer = WhitespaceSplit()
        core.post_processor = TemplateProcessing(single=wrap, special_tokens=[("<bos>", 1), ("<eos>", 2)])
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
        )
        tokenizer.chat_template = CHAT_TEMPLATE if chat else None
        return tokenizer

    return make


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer: MakeTokenizer) -> PreTrainedTokenizerFast:
    """Adds nothing, has a chat template."""
    return make_tokenizer(chat=True)
