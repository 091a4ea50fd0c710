"""The prompts of a run: read, rendered and tokenized once, then walked in an order that depends on nothing but the seed
and the running episode number."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quartet.errors import DataError, brief
from quartet.records import Prompts
from quartet.run.prompt_files import Row, read_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK = 1024
"""Prompts tokenized in one call: enough to keep the tokenizer's threads busy, few enough to hold as Python lists."""
_LONG_CHARACTERS = 32
"""Characters for each token allowed beyond which the beginning of a prompt is tokenized first: megabytes would take minutes."""


class PromptSet:
    """Tokenized prompts, kept as one flat array of ids.

    Not a list of tensors, because a tensor object costs more than the ids of a usual prompt.
    """

    def __init__(self, texts: Sequence[str], ids: Tensor, lengths: Tensor) -> None:
        """`ids` are the prompts' token ids one after another, `[all tokens]`; `lengths` `[prompts]` cuts them."""
        assert len(texts) == len(lengths)
        assert int(lengths.sum()) == len(ids)
        self._texts = tuple(texts)
        self._ids = ids.to(torch.int32)
        self._offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.long()]).cumsum(0)
        self._order: tuple[tuple[int, int], Tensor] | None = None

    @classmethod
    def from_tokens(cls, texts: Sequence[str], tokens: Sequence[Sequence[int]]) -> PromptSet:
        """A set of prompts that are tokenized already; `tokens` are ids without padding, one sequence a text."""
        ids = torch.tensor([token for prompt in tokens for token in prompt], dtype=torch.int32)
        return cls(texts, ids, torch.tensor([len(prompt) for prompt in tokens], dtype=torch.int64))

    def __len__(self) -> int:
        return len(self._texts)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt; 0 for an empty set."""
        return int(self._offsets.diff().max()) if len(self) else 0

    def text(self, index: int) -> str:
        """Prompt `index` as text, the chat template applied."""
        return self._texts[index]

    def tokens(self, index: int) -> Tensor:
        """int64 `[prompt tokens]`: a copy of the ids of prompt `index`."""
        return self._ids[self._offsets[index] : self._offsets[index + 1]].long()

    def subset(self, indices: Iterable[int]) -> PromptSet:
        """The prompts at `indices`, in that order."""
        chosen = torch.tensor(list(indices), dtype=torch.int64)
        lengths = self._offsets.diff()[chosen]
        # Each token's place in the new array, moved by the distance between its prompt's old start and the new one.
        shift = self._offsets[chosen] - (lengths.cumsum(0) - lengths)
        places = torch.arange(int(lengths.sum())) + shift.repeat_interleave(lengths)
        return PromptSet([self.text(i) for i in chosen.tolist()], self._ids[places], lengths)

    def digest(self) -> str:
        """SHA-256 over all prompts' texts and ids in order."""
        digest = hashlib.sha256()
        for text in self._texts:
            content = text.encode()
            digest.update(len(content).to_bytes(8, "little") + content)
        digest.update(self._offsets.numpy().tobytes() + self._ids.numpy().data)
        return digest.hexdigest()

    def in_order(self, start_episode: int = 0) -> Prompts:
        """All prompts once, as they lie, numbered from `start_episode`; for evaluation."""
        return self._prompts(range(start_episode, start_episode + len(self)), range(len(self)))

    def batch(self, start_episode: int, count: int, seed: int) -> Prompts:
        """Prompts of the episodes `start_episode ... start_episode + count - 1`.

        The set is walked round and round and shuffled anew for each pass; every prompt appears once a pass. The result
        depends on the arguments alone, so that resuming needs no more than the running episode number.
        """
        assert len(self), "a prompt set without prompts has no batches"
        episodes = range(start_episode, start_episode + count)
        places = (divmod(episode, len(self)) for episode in episodes)
        return self._prompts(episodes, [int(self._permutation(seed, turn)[place]) for turn, place in places])

    def _prompts(self, episodes: Iterable[int], indices: Sequence[int]) -> Prompts:
        texts = tuple(self.text(i) for i in indices)
        return Prompts(episodes=tuple(episodes), texts=texts, tokens=tuple(self.tokens(i) for i in indices))

    def _permutation(self, seed: int, turn: int) -> Tensor:
        """Order of pass `turn`; the last one asked for is kept, older ones are drawn again if ever needed."""
        if self._order is None or self._order[0] != (seed, turn):
            self._order = ((seed, turn), torch.randperm(len(self), generator=_generator("pass", seed, turn)))
        return self._order[1]


def load_prompts(
    source: str,
    *,
    column: str,
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_tokens: int,
    warn: Callable[[str], None],
) -> PromptSet:
    """Read, render and tokenize the prompts of `source` (see `prompt_files.read_rows` for what it may be).

    A prompt is text, tokenized with the special tokens that the tokenizer puts before it but without an EOS after it
    (a prompt that ends with EOS is a finished text), or a list of chat messages, rendered with the chat template and
    its generation prompt. Empty prompts and prompts of more than `max_prompt_tokens` tokens are left out; `warn` is
    told how many.

    Raises DataError for an unreadable source, a value that is no prompt, and when no prompt is left.
    """
    rows = read_rows(source, column=column, split=split)
    encode = _Encoder(tokenizer, max_prompt_tokens)
    texts: list[str] = []
    ids, lengths = array("i"), array("q")
    total = too_long = empty = 0
    while chunk := list(islice(rows, _CHUNK)):
        for text, tokens in encode(chunk):
            total += 1
            if not tokens or not text.strip():
                empty += 1
            elif len(tokens) > max_prompt_tokens:
                too_long += 1
            else:
                texts.append(text)
                ids.extend(tokens)
                lengths.append(len(tokens))
    if not texts:
        _refuse(source, total, too_long, empty, max_prompt_tokens)
    if too_long:
        warn(f"{too_long} of {total} prompts of {source} are left out: over data.max_prompt_tokens={max_prompt_tokens}")
    if empty:
        warn(f"{empty} of {total} prompts of {source} are left out: empty")
    return PromptSet(texts, torch.tensor(ids, dtype=torch.int32), torch.tensor(lengths, dtype=torch.int64))


def hold_out(prompts: PromptSet, count: int, seed: int) -> tuple[PromptSet, PromptSet]:
    """Split off `count` prompts, chosen by `seed`, for evaluation: (training, evaluation), both in the set's order.

    At most a tenth of the set is taken, but one prompt if there are two or more. Prompts that occur more than once in
    the set may fall on both sides.
    """
    size = len(prompts)
    taken = min(count, max(1, size // 10)) if size > 1 else 0
    order = torch.randperm(size, generator=_generator("hold out", seed, 0)).tolist()
    return prompts.subset(sorted(order[taken:])), prompts.subset(sorted(order[:taken]))


def _generator(purpose: str, seed: int, number: int) -> torch.Generator:
    """A CPU generator whose seed is a hash, so that neighbouring seeds and passes have nothing in common."""
    digest = hashlib.sha256(f"quartet prompts/{purpose}/{seed}/{number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)


def _refuse(source: str, total: int, too_long: int, empty: int, limit: int) -> None:
    if total == 0:
        raise DataError(f"{source} holds no prompts; give a file or data set with at least one")
    raise DataError(
        f"{source} has no usable prompt among {total}: {too_long} are over data.max_prompt_tokens={limit} and {empty} "
        "are empty; raise the limit or give other prompts"
    )


class _Encoder:
    """Turns rows into (text, token ids), a chunk at a time."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, most: int) -> None:
        """`most`: tokens above which nobody asks how many they are."""
        self._tokenizer = tokenizer
        self._most = most
        eos = tokenizer.eos_token_id
        # Asked once with a text that surely does not end with EOS: a text may hold EOS of its own, which stays.
        self._appended_eos = eos is not None and self._ids(["a"], special=True)[0][-1:] == [eos]

    def __call__(self, rows: Sequence[Row]) -> Iterator[tuple[str, list[int]]]:
        rendered = [self._render(row) for row in rows]
        plain = iter(self._ids([self._enough(text) for text, is_chat in rendered if not is_chat], special=True))
        chats = iter(self._ids([self._enough(text) for text, is_chat in rendered if is_chat], special=False))
        for text, is_chat in rendered:
            if is_chat:
                yield text, next(chats)
            else:
                tokens = next(plain)
                yield text, tokens[:-1] if self._appended_eos else tokens

    def _enough(self, text: str) -> str:
        """The text, or as much of its beginning as shows that it has too many tokens.

        Twice as many, because a cut may part the last word's tokens otherwise.
        """
        start = text[: _LONG_CHARACTERS * self._most]
        shows = len(start) < len(text) and len(self._ids([start], special=False)[0]) > 2 * self._most
        return start if shows else text

    def _ids(self, texts: list[str], *, special: bool) -> list[list[int]]:
        if not texts:
            return []
        encoded = self._tokenizer(texts, add_special_tokens=special, return_attention_mask=False, verbose=False)
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    def _render(self, row: Row) -> tuple[str, bool]:
        """(text, whether it is a rendered chat)."""
        is_chat = isinstance(row.value, list)
        text = self._apply_template(_messages(row), row.where) if is_chat else row.value
        if not isinstance(text, str):
            raise DataError(
                f"{row.where} is of type {type(row.value).__name__}; a prompt is text or a list of chat messages "
                '{"role": ..., "content": ...}'
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{row.where} holds half a surrogate pair, which is no text; repair the prompt") from error
        return text, is_chat

    def _apply_template(self, messages: list[dict[str, Any]], where: str) -> str:
        if not messages:
            return ""
        if not self._tokenizer.chat_template:
            raise DataError(
                f"{where} holds chat messages but the tokenizer of models.sft has no chat template; "
                "set one in the checkpoint (tokenizer.chat_template), or give the prompts as text"
            )
        import jinja2

        try:
            text = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except Exception as error:
            # A template is a program of somebody else's.
            said = (
                brief(error) if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {brief(error)}"
            )
            raise DataError(
                f"{where} is refused by the chat template ({said}); change the messages, or repair the template"
            ) from error
        assert isinstance(text, str)
        return text


def _messages(row: Row) -> list[dict[str, Any]]:
    """The chat messages of a row, without the empty fields that Arrow adds to make all messages alike."""
    assert isinstance(row.value, list)
    messages: list[dict[str, Any]] = []
    for number, message in enumerate(row.value, start=1):
        if not isinstance(message, Mapping):
            raise DataError(f"message {number} in {row.where} is of type {type(message).__name__}; {_MESSAGE}")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                kind = type(message[key]).__name__ if key in message else "missing"
                raise DataError(f"{key!r} of message {number} in {row.where} is {kind}, not text; {_MESSAGE}")
        messages.append({key: value for key, value in message.items() if value is not None})
    if messages and messages[-1]["role"] == "assistant":
        raise DataError(
            f"the chat in {row.where} ends with the assistant's message; a prompt ends where the policy is to answer, "
            "so leave that message out"
        )
    return messages


_MESSAGE = 'write each message as {"role": "user", "content": "..."}'
