"""Tokenization of text and chats, what is left out, and the order in which prompts are walked."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from quartet.errors import DataError
from quartet.run.data import PromptSet, hold_out, load_prompts


def load(folder: Path, cells: list[object], tokenizer: PreTrainedTokenizerFast, **keys: Any) -> PromptSet:
    """The prompts of a JSONL file with these cells; warnings fail unless `warn` is given."""
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": cell}) + "\n" for cell in cells))
    given = {"column": "prompt", "split": "train", "max_prompt_tokens": 8, "warn": pytest.fail, **keys}
    return load_prompts(str(path), tokenizer=tokenizer, **given)


def ids(prompts: PromptSet) -> list[list[int]]:
    return [prompts.tokens(index).tolist() for index in range(len(prompts))]


def numbered(size: int) -> PromptSet:
    """Prompt i has text `i` and i + 1 tokens, all of them i."""
    return PromptSet.from_tokens([str(i) for i in range(size)], [[i] * (i + 1) for i in range(size)])


def user(content: object) -> dict[str, object]:
    return {"role": "user", "content": content}


@pytest.mark.parametrize(
    ("wrap", "expected"),
    [
        ("$A", [[6, 7], [8, 2]]),
        ("<bos> $A", [[1, 6, 7], [1, 8, 2]]),
        ("$A <eos>", [[6, 7], [8, 2]]),
        ("<bos> $A <eos>", [[1, 6, 7], [1, 8, 2]]),
    ],
)
def test_text_gets_no_eos_but_keeps_its_own(tmp_path: Path, make_tokenizer, wrap: str, expected: list) -> None:
    prompts = load(tmp_path, ["a b", "c <eos>"], make_tokenizer(wrap))
    assert ids(prompts) == expected
    assert [prompts.text(0), prompts.text(1)] == ["a b", "c <eos>"]
    assert prompts.tokens(0).dtype == torch.int64


@pytest.mark.parametrize("wrap", ["$A", "<bos> $A <eos>"])
def test_chat_is_rendered_and_gets_no_second_bos(tmp_path: Path, make_tokenizer, wrap: str) -> None:
    chat = [user("a"), {"role": "assistant", "content": "b", "name": None}, user("c")]
    prompts = load(tmp_path, [chat, [user("d")]], make_tokenizer(wrap, chat=True))
    assert prompts.text(0) == "<bos> <user> a <assistant> b <user> c <assistant>"
    assert ids(prompts) == [[1, 4, 6, 5, 7, 4, 8, 5], [1, 4, 9, 5]]


def test_text_and_chats_may_alternate(tmp_path: Path, tokenizer) -> None:
    prompts = load(tmp_path, ["a", [user("b")], "c", [user("d")], "e"], tokenizer)
    assert ids(prompts) == [[6], [1, 4, 7, 5], [8], [1, 4, 9, 5], [10]]
    assert prompts.longest == 4


def test_more_prompts_than_one_chunk(tmp_path: Path, tokenizer) -> None:
    letters = "abcdefghij"
    cells = [letters[i % 10] + " " + letters[i // 10 % 10] for i in range(2500)]
    assert ids(load(tmp_path, cells, tokenizer)) == [[6 + i % 10, 6 + i // 10 % 10] for i in range(2500)]


def test_long_and_empty_prompts_are_left_out_with_one_warning_each(tmp_path: Path, make_tokenizer) -> None:
    warnings: list[str] = []
    cells = ["a b c", "a b c d", "", " \n", [], "e", "a b c d e f"]
    prompts = load(tmp_path, cells, make_tokenizer("<bos> $A"), max_prompt_tokens=4, warn=warnings.append)
    assert ids(prompts) == [[1, 6, 7, 8], [1, 10]]
    path = tmp_path / "prompts.jsonl"
    assert warnings == [
        f"2 of 7 prompts of {path} are left out: over data.max_prompt_tokens=4",
        f"3 of 7 prompts of {path} are left out: empty",
    ]


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (3, "line 2 of .* is of type int; a prompt is text or"),
        (None, "line 2 of .* is of type NoneType"),
        ({"role": "user"}, "line 2 of .* is of type dict"),
        (["text"], "message 1 in line 2 of .* is of type str"),
        ([user("a"), {"content": "b"}], "'role' of message 2 in line 2 of .* is missing"),
        ([user(None)], "'content' of message 1 in line 2 of .* is NoneType"),
        ([user([{"type": "text", "text": "a"}])], "'content' of message 1 in line 2 of .* is list"),
        ([user("a"), {"role": "assistant", "content": "b"}], "line 2 of .* ends with the assistant's message"),
        ([{"role": "system", "content": "a"}], "line 2 of .* refused by the chat template .no system messages."),
        ("\ud800", "line 2 of .* half a surrogate pair"),
        ([user("\ud800")], "line 2 of .* half a surrogate pair"),
    ],
)
def test_value_that_is_no_prompt(tmp_path: Path, tokenizer, cell: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(tmp_path, ["a", cell], tokenizer)


def test_chat_without_a_template(tmp_path: Path, make_tokenizer) -> None:
    with pytest.raises(DataError, match=r"line 2 of .* no chat template; set one .*, or give the prompts as text"):
        load(tmp_path, ["a", [user("b")]], make_tokenizer())


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ 1/0 }}", "ZeroDivisionError: division by zero"),
        ("{{ '{x}'.format(y=1) }}", "KeyError: 'x'"),
        ("{{ '{5}'.format(1) }}", "IndexError: .*"),
        ("{{ 'a'.encode('nope') }}", "LookupError: unknown encoding: nope"),
        ("{% for i in range(1000000) %}x{% endfor %}", "OverflowError: .*"),
        ("{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}", "RecursionError: .*"),
    ],
)
def test_chat_whose_template_fails(tmp_path: Path, make_tokenizer, template: str, said: str) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=rf"line 2 of .* refused by the chat template \({said}\); change the messages"):
        load(tmp_path, ["a", [user("b")]], tokenizer)


def test_no_usable_prompt(tmp_path: Path, tokenizer) -> None:
    with pytest.raises(
        DataError, match=r"no usable prompt among 3: 2 are over data.max_prompt_tokens=1 and 1 are empty"
    ):
        load(tmp_path, ["a b", "", "c d"], tokenizer, max_prompt_tokens=1)
    with pytest.raises(DataError, match="holds no prompts"):
        load(tmp_path, [], tokenizer)


def test_every_prompt_appears_once_a_pass_and_passes_differ() -> None:
    prompts = numbered(10)
    passes = [prompts.batch(10 * turn, 10, seed=3).texts for turn in range(4)]
    for texts in passes:
        assert sorted(texts, key=int) == [str(i) for i in range(10)]
    assert len(set(passes)) == 4
    assert prompts.batch(0, 10, seed=4).texts not in passes


def test_batch_has_texts_tokens_and_episode_numbers_that_belong_together() -> None:
    batch = numbered(7).batch(5, 4, seed=0)
    assert batch.episodes == (5, 6, 7, 8)
    for text, tokens in zip(batch.texts, batch.tokens, strict=True):
        assert tokens.dtype == torch.int64
        assert tokens.tolist() == [int(text)] * (int(text) + 1)


def test_batch_depends_on_its_arguments_alone() -> None:
    """Any cut of the episodes, in any order of asking, gives the same sequence: a resume needs no other state."""
    whole = numbered(7).batch(0, 40, seed=1).texts
    fresh = numbered(7)
    assert [fresh.batch(start, 5, seed=1).texts for start in range(35, -1, -5)] == [
        whole[start : start + 5] for start in range(35, -1, -5)
    ]


def test_order_of_a_seed_is_fixed() -> None:
    """Literal, so that a change of the order, which would break resuming older runs, does not go unseen."""
    assert "".join(numbered(6).batch(0, 12, seed=0).texts) == "350142024531"


def test_set_smaller_than_the_batch_is_walked_round_and_round() -> None:
    counts = Counter(numbered(3).batch(0, 64, seed=0).texts)
    assert sorted(counts.values()) == [21, 21, 22]
    assert numbered(1).batch(9, 4, seed=0).texts == ("0",) * 4


def test_in_order() -> None:
    prompts = numbered(3).in_order(start_episode=7)
    assert prompts.episodes == (7, 8, 9)
    assert prompts.texts == ("0", "1", "2")
    assert [tokens.tolist() for tokens in prompts.tokens] == [[0], [1, 1], [2, 2, 2]]
    assert len(PromptSet.from_tokens([], []).in_order()) == 0


def test_subset_of_unequal_lengths() -> None:
    assert ids(numbered(5).subset([4, 0, 2])) == [[4] * 5, [0], [2] * 3]
    assert ids(numbered(5).subset([])) == []


@pytest.mark.parametrize(
    ("size", "count", "taken"), [(100, 4, 4), (100, 16, 10), (19, 16, 1), (5, 16, 1), (2, 1, 1), (1, 4, 0), (50, 0, 0)]
)
def test_hold_out_takes_at_most_a_tenth(size: int, count: int, taken: int) -> None:
    train, evaluation = hold_out(numbered(size), count, seed=0)
    assert len(evaluation) == taken
    assert sorted(ids(train) + ids(evaluation)) == sorted(ids(numbered(size)))


def test_hold_out_is_chosen_by_seed_and_keeps_the_order() -> None:
    train, evaluation = hold_out(numbered(60), 6, seed=1)
    assert ids(hold_out(numbered(60), 6, seed=1)[1]) == ids(evaluation)
    assert ids(hold_out(numbered(60), 6, seed=2)[1]) != ids(evaluation)
    assert ids(train) == sorted(ids(train))
    assert ids(evaluation) == sorted(ids(evaluation))
