"""Prompts for the demo: the first few tokens of review sentences, for the policy to continue."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Protocol

from quartet.errors import DataError

OPENING_TOKENS = 6
EVALUATION_PROMPTS = 64


class TextTokenizer(Protocol):
    """The two calls that openings need of a tokenizer."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text."""
        ...

    def decode(self, tokens: list[int]) -> str:
        """Text of token ids."""
        ...


def openings(
    texts: Iterable[str],
    tokenizer: TextTokenizer,
    *,
    tokens: int = OPENING_TOKENS,
    avoid: Collection[str] = (),
    limit: int | None = None,
) -> list[str]:
    """The first `tokens` tokens of each text, as text.

    Left out: texts that are hardly longer than the opening, openings that stop inside a word or end in a blank, those
    that do not encode to the same tokens again, repetitions, and those in `avoid`.
    """
    found: dict[str, None] = {}
    for text in texts:
        if limit is not None and len(found) == limit:
            break
        ids = tokenizer.encode(text, add_special_tokens=False)
        if len(ids) < tokens + 2:
            continue
        opening, following = tokenizer.decode(ids[:tokens]), tokenizer.decode(ids[tokens : tokens + 1])
        splits_word = opening[-1:].isalnum() and following[:1].isalnum()
        same_tokens = tokenizer.encode(opening, add_special_tokens=False) == ids[:tokens]
        if same_tokens and not splits_word and opening == opening.strip() and opening not in avoid:
            found.setdefault(opening)
    return list(found)


def evaluation_prompts(texts: Iterable[str], tokenizer: TextTokenizer, *, count: int = EVALUATION_PROMPTS) -> list[str]:
    """Exactly `count` openings.

    Raises:
        DataError: the texts give fewer.
    """
    prompts = openings(texts, tokenizer, limit=count)
    if len(prompts) < count:
        raise DataError(f"the evaluation sentences give {len(prompts)} prompts of the {count} needed; hold out more")
    return prompts


def write_prompts(path: Path, prompts: Sequence[str]) -> None:
    """Write one JSON object `{"prompt": text}` a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"prompt": prompt}, ensure_ascii=False) + "\n" for prompt in prompts]
    path.write_text("".join(lines), encoding="utf-8")
