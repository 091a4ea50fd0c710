"""Whether two checkpoints rest on the same weights."""

from __future__ import annotations

import hashlib
import struct
from typing import Any

from quartet.models.checkpoint_info import CheckpointInfo, TensorInfo

_BLOCKS, _BLOCK = 64, 16_384
"""Places and bytes at which a large tensor is looked at; one below `_WHOLE` bytes is read whole."""
_WHOLE = 4 << 20
_LABELS = 64
"""Most rows of a classifier's head."""
_OF_NO_WEIGHT = {
    *("architectures", "auto_map", "problem_type", "tokenizer_class", "transformers_version"),
    *("bos_token_id", "decoder_start_token_id", "eos_token_id", "pad_token_id", "sep_token_id"),
    *("id2label", "label2id", "num_labels", "tie_word_embeddings"),
    *("dtype", "torch_dtype", "initializer_range", "use_cache", "chunk_size_feed_forward"),
    *("output_attentions", "output_hidden_states", "return_dict"),
}
"""Entries of a configuration that say nothing of how the transformer computes; nor do names with an underscore in front, and
every dropout is off."""


def same_base(one: CheckpointInfo, other: CheckpointInfo) -> bool:
    """Whether two checkpoints rest on the same full weights, judged by headers and bytes, not by path.

    Heads may differ (a language model's file may hold `lm_head`, a classifier's `score`): tensors that only one file holds
    must be one (an outermost layer with a row for each token, or with few rows). All shared tensors must agree in dtype and
    shape, and in their bytes: small ones and whatever has a row for each token are compared whole, large ones at `_BLOCKS`
    places. The configurations must agree in all that the transformer computes by (rotary embeddings, windows, norms).
    """
    if _computed_by(one.config.to_dict()) != _computed_by(other.config.to_dict()):
        return False
    mine, theirs = one.tensors, other.tensors
    shared = sorted(mine.keys() & theirs.keys())
    if not shared or any((mine[k].dtype, mine[k].shape) != (theirs[k].dtype, theirs[k].shape) for k in shared):
        return False
    vocabulary = getattr(one.config.get_text_config(), "vocab_size", None)
    for name in mine.keys() ^ theirs.keys():
        rows = (mine.get(name) or theirs[name]).shape[:1]
        head = name.count(".") == 1 and bool(rows) and (rows[0] == vocabulary or rows[0] <= _LABELS)
        if not head:
            return False
    return all(
        _same_place(mine[k], theirs[k])
        or (_readable(mine[k], theirs[k]) and digest_of(mine[k], vocabulary) == digest_of(theirs[k], vocabulary))
        for k in shared
    )


def _computed_by(content: dict[str, Any]) -> dict[str, Any]:
    """Of a configuration, what decides which function the weights are."""
    return {
        name: _computed_by(given) if isinstance(given, dict) else given
        for name, given in content.items()
        if name not in _OF_NO_WEIGHT and not name.startswith("_") and "drop" not in name
    }


def _same_place(one: TensorInfo, other: TensorInfo) -> bool:
    if one.offsets != other.offsets:
        return False
    return one.file == other.file or (_readable(one, other) and one.file.samefile(other.file))


def _readable(one: TensorInfo, other: TensorInfo) -> bool:
    """Weights that were left on the Hub are not: two repositories then count as different."""
    return one.file.exists() and other.file.exists()


def digest_of(info: TensorInfo, vocabulary: int | None) -> bytes:
    """Hash of a tensor's bytes, or of evenly spaced blocks of them where it is large and has no row for each token."""
    whole = info.nbytes <= _WHOLE or (vocabulary is not None and info.shape[:1] == (vocabulary,))
    digest = hashlib.sha256()
    with info.file.open("rb") as stream:
        begin = 8 + struct.unpack("<Q", stream.read(8))[0] + info.offsets[0]
        stream.seek(begin)
        if whole:
            digest.update(stream.read(info.nbytes))
            return digest.digest()
        for place in range(_BLOCKS):
            stream.seek(begin + (info.nbytes - _BLOCK) * place // (_BLOCKS - 1))
            digest.update(stream.read(_BLOCK))
    return digest.digest()
