"""The tokenizer of a run, and the check that both checkpoints speak the same vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from quartet.errors import CheckpointError, ConfigError, brief
from quartet.models.checkpoint_info import CheckpointInfo

_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
"""Files that hold a vocabulary: where there is one, a tokenizer that cannot be read is damaged and not missing."""


def load_tokenizer(sft: CheckpointInfo, reward: CheckpointInfo) -> tuple[Any, list[str]]:
    """The SFT checkpoint's tokenizer, with a pad token.

    Returns:
        The tokenizer and notices for the user (a pad token that was chosen).

    Raises:
        CheckpointError: no tokenizer, or the reward checkpoint's vocabulary differs.
    """
    tokenizer = _tokenizer(sft)
    if tokenizer is None:
        raise CheckpointError(
            f"{sft.key}={sft.name!r} holds no tokenizer; save it there with tokenizer.save_pretrained"
        )
    other = _tokenizer(reward)
    if other is None:
        raise CheckpointError(
            f"{reward.key}={reward.name!r} holds no tokenizer, so its vocabulary cannot be compared with the SFT "
            "checkpoint's; save it there with tokenizer.save_pretrained"
        )
    _refuse_other_vocabulary(sft, reward, tokenizer.get_vocab(), other.get_vocab())
    notices = []
    if tokenizer.pad_token_id is None:
        chosen = tokenizer.unk_token if tokenizer.unk_token_id is not None else tokenizer.eos_token
        if chosen is None:
            raise CheckpointError(
                f"the tokenizer of {sft.key}={sft.name!r} has no pad, unk or eos token; set pad_token in it"
            )
        tokenizer.pad_token = chosen
        notices.append(f"the tokenizer has no pad token: {chosen!r} is used, which masks by length make safe")
    return tokenizer, notices


def stop_token_id(stop: str | int | None, tokenizer: Any) -> int | None:
    """Id of the token that ends a response (`rollout.stop`).

    Raises:
        ConfigError: the tokenizer has no such token.
    """
    if stop is None:
        return None
    if stop == "eos":
        if tokenizer.eos_token_id is None:
            raise ConfigError("rollout.stop=eos, and the tokenizer has no eos token; name another token or null")
        return int(tokenizer.eos_token_id)
    if isinstance(stop, int):
        if not 0 <= stop < len(tokenizer):
            raise ConfigError(f"rollout.stop={stop} is not a token id; the vocabulary has {len(tokenizer)} tokens")
        return stop
    ids = tokenizer.encode(stop, add_special_tokens=False)
    if len(ids) != 1:
        raise ConfigError(f"rollout.stop={stop!r} is {len(ids)} tokens in this vocabulary; name a single token")
    return int(ids[0])


def refuse_long_sequences(infos: tuple[CheckpointInfo, ...], prompt: int, response: int) -> None:
    """Check the longest sequence against every model's positions.

    Raises:
        ConfigError: it does not fit.
    """
    for info in infos:
        limit = _positions(info)
        if limit is not None and prompt + response > limit:
            raise ConfigError(
                f"the longest prompt ({prompt} tokens) plus rollout.response_length={response} is {prompt + response} "
                f"tokens, and {info.key}={info.name!r} has {limit} positions; lower data.max_prompt_tokens or "
                "rollout.response_length"
            )


def refuse_long_responses(infos: tuple[CheckpointInfo, ...], response: int) -> None:
    """Check that a response leaves room for a prompt, where the prompts are not known.

    Raises:
        ConfigError: it does not.
    """
    for info in infos:
        limit = _positions(info)
        if limit is not None and response >= limit:
            raise ConfigError(
                f"rollout.response_length={response} leaves no room for a prompt in the {limit} positions of "
                f"{info.key}={info.name!r}; lower it"
            )


def _positions(info: CheckpointInfo) -> int | None:
    limit: int | None = getattr(info.config.get_text_config(), "max_position_embeddings", None)
    return limit


def _tokenizer(info: CheckpointInfo) -> Any:
    for place in (info.adapter, info.base):
        if place is None:
            continue
        try:
            tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=info.trust_remote_code)
        except Exception as error:
            # The libraries below document no base of what they raise for a damaged file, and use Exception itself.
            if any((Path(place) / name).is_file() for name in _VOCABULARIES):
                raise CheckpointError(
                    f"{info.key}={info.name!r}: its tokenizer cannot be read ({type(error).__name__}: {brief(error)}); "
                    "fetch or save it again"
                ) from error
            continue
        # Without files transformers makes up a tokenizer of the model's class that knows its special tokens alone.
        if tokenizer.get_vocab().keys() - tokenizer.get_added_vocab().keys():
            return tokenizer
    return None


def _refuse_other_vocabulary(
    sft: CheckpointInfo, reward: CheckpointInfo, mine: dict[str, int], theirs: dict[str, int]
) -> None:
    if mine == theirs:
        return
    odd = sorted(token for token in mine.keys() | theirs.keys() if mine.get(token) != theirs.get(token))
    raise CheckpointError(
        f"{sft.key}={sft.name!r} and {reward.key}={reward.name!r} have different vocabularies "
        f"({len(mine)} and {len(theirs)} tokens, {len(odd)} differ, such as {odd[0]!r}); "
        "the value model reads the policy's tokens, so use a reward checkpoint of the same tokenizer"
    )
