"""Openings of sentences: they encode to the same tokens again, stop at a word and do not repeat."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quartet.demo.prompts import evaluation_prompts, openings, write_prompts
from quartet.errors import DataError


class PairTokenizer:
    """Two characters a token, so that where a token ends is plain to see; `~` is read as `-` and does not come back."""

    def __init__(self) -> None:
        self.ids: dict[str, int] = {}

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        pieces = [text[start : start + 2] for start in range(0, len(text), 2)]
        return [self.ids.setdefault(piece, len(self.ids)) for piece in pieces]

    def decode(self, tokens: list[int]) -> str:
        pieces = list(self.ids)
        return "".join(pieces[token] for token in tokens).replace("~", "-")


def test_an_opening_is_the_first_tokens_of_a_sentence() -> None:
    assert openings(["abcd efgh"], PairTokenizer(), tokens=2) == ["abcd"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("abcdefghij", "stops inside a word"),
        ("abc defghi", "ends in a blank"),
        ("a~cd efgh", "does not come back to the same tokens"),
        ("abcd e", "is hardly longer than the opening"),
    ],
)
def test_openings_that_are_no_good_are_left_out(text: str, why: str) -> None:
    assert openings([text], PairTokenizer(), tokens=2) == [], why


def test_repeated_and_avoided_openings_are_left_out() -> None:
    texts = ["abcd efgh", "abcd ijkl", "mnop efgh", "qrst efgh"]
    assert openings(texts, PairTokenizer(), tokens=2, avoid=["mnop"]) == ["abcd", "qrst"]
    assert openings(texts, PairTokenizer(), tokens=2, limit=2) == ["abcd", "mnop"]


def test_evaluation_prompts_are_exactly_as_many_as_asked() -> None:
    texts = [f"the opening{number} of a sentence" for number in "123"]
    assert len(evaluation_prompts(texts, PairTokenizer(), count=2)) == 2
    with pytest.raises(DataError, match="give 3 prompts of the 4 needed"):
        evaluation_prompts(texts, PairTokenizer(), count=4)


def test_prompts_are_written_one_json_object_a_line(tmp_path: Path) -> None:
    path = tmp_path / "data" / "prompts.jsonl"
    write_prompts(path, ["It's a", 'André "x"'])
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == [
        {"prompt": "It's a"},
        {"prompt": 'André "x"'},
    ]
