"""A preallocated key-value cache in which every row stands at its own position."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

FULL, SLIDING = "full_attention", "sliding_attention"
# What configurations say of windows that is already in `sliding_window` and `layer_types`.
_READ = {
    "sliding_window",
    "sliding_window_size",
    "use_sliding_window",
    "max_window_layers",
    "sliding_window_pattern",
    "_sliding_window_pattern",
}


class NotDrivable(Exception):
    """This model cannot be decoded with rows at different positions; the message says why."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """What a layer's tokens may look at: everything before them, or the last `window` tokens."""

    kind: str
    window: int | None


def layer_patterns(config: Any) -> list[Pattern]:
    """The attention pattern of every layer, from a model's configuration.

    Raises:
        NotDrivable: a layer attends in a way of which only the model itself knows (chunks, linear attention).
    """
    config = config.get_text_config(decoder=True)
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kinds = [FULL if window is None else SLIDING] * config.num_hidden_layers
    strange = sorted(set(kinds) - {FULL, SLIDING})
    if strange:
        raise NotDrivable(f"it has layers of the kind {', '.join(strange)}")
    for name, value in vars(config).items():
        if ("window" in name or "chunk" in name) and name not in _READ and isinstance(value, int) and value > 1:
            raise NotDrivable(f"its attention has a {name} of its own")
    return [Pattern(kind, window if kind == SLIDING else None) for kind in kinds]


@dataclass(slots=True)
class _Place:
    """Where the next `update` of every layer writes; one object for all layers."""

    first: int = 0
    """Prefill: the first of the rows that are written, all from column 0."""
    rows: int = 0
    """Decoding: rows 0 to rows - 1 get one token each; 0 means prefill."""
    columns: int = 0
    """Decoding: columns that are attended over."""
    index: tuple[Tensor, slice, Tensor] | None = None
    """Decoding: each row's number and the column it writes."""


class RowLayer(CacheLayerMixin):
    """Keys and values of one layer, `[rows, heads, columns, head size]`; row i holds its tokens in columns 0, 1, ..."""

    supports_early_init = False

    def __init__(self, place: _Place, rows: int, columns: int, dtype: torch.dtype, sliding: bool) -> None:
        initialize: Any = super().__init__  # without annotations in transformers
        initialize()
        self.is_sliding = sliding
        self._place = place
        self._shape = (rows, columns)
        self._dtype = dtype

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for heads of these shapes; zeros, since a column that is masked still takes part with weight 0."""
        rows, columns = self._shape
        for name, states in (("keys", key_states), ("values", value_states)):
            _, heads, _, size = states.shape
            setattr(self, name, torch.zeros(rows, heads, columns, size, dtype=self._dtype, device=states.device))
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write new keys and values; give what the new tokens attend over.

        A prefill attends over itself alone, so it gets back what it gave; decoding gets views of the cache.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values, place = self.keys, self.values, self._place
        assert keys is not None
        assert values is not None
        if place.index is None:
            rows = slice(place.first, place.first + key_states.shape[0])
            keys[rows, :, : key_states.shape[2]] = key_states.to(self._dtype)
            values[rows, :, : value_states.shape[2]] = value_states.to(self._dtype)
            return key_states, value_states
        keys[place.index] = key_states.squeeze(2).to(self._dtype)
        values[place.index] = value_states.squeeze(2).to(self._dtype)
        return keys[: place.rows, :, : place.columns], values[: place.rows, :, : place.columns]

    def move(self, source: Tensor, target: Tensor, columns: int) -> None:
        """Copy rows `source` over rows `target`."""
        for store in (self.keys, self.values):
            if store is not None:
                store[target, :, :columns] = store[source, :, :columns]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(columns attended over, offset): a prefill starts empty."""
        return self._place.columns or query_length, 0

    def get_seq_length(self) -> int:
        """Tokens before the new ones in the longest row; 0 in a prefill."""
        return max(self._place.columns - 1, 0)

    def get_max_length(self) -> int:
        """Columns allocated."""
        return self._shape[1]


class RowCache(Cache):
    """A cache of `rows` rows whose tokens stand in columns 0 to length - 1 of their own row.

    Say where the next forward pass writes with `prefill` or `decode`, then call the model.
    """

    def __init__(self, patterns: list[Pattern], rows: int, columns: int, dtype: torch.dtype) -> None:
        self._place = _Place()
        self._rows: list[RowLayer] = [
            RowLayer(self._place, rows, columns, dtype, pattern.kind == SLIDING) for pattern in patterns
        ]
        super().__init__(layers=list(self._rows))
        self.shape = (rows, columns)
        """Rows and columns allocated."""

    def prefill(self, first: int) -> None:
        """The next forward pass holds whole prompts, for the rows from `first` on."""
        self._place.first, self._place.rows, self._place.columns, self._place.index = first, 0, 0, None

    def decode(self, positions: Tensor, columns: int) -> None:
        """The next forward pass holds one token for each of the rows 0 to n - 1.

        Args:
            positions: int64 `[n]`, the column each row writes.
            columns: attended over; more than every position.
        """
        count = len(positions)
        place = self._place
        place.rows, place.columns = count, columns
        place.index = (torch.arange(count, device=positions.device), slice(None), positions)

    def move(self, source: Tensor, target: Tensor, columns: int) -> None:
        """Copy the first `columns` columns of rows `source` over rows `target`, in every layer."""
        for layer in self._rows:
            layer.move(source, target, columns)


def decode_masks(
    patterns: list[Pattern], positions: Tensor, columns: int, dtype: torch.dtype
) -> Tensor | dict[str, Tensor]:
    """Additive masks `[n, 1, 1, columns]` for one new token a row: 0 where it may look, the lowest number elsewhere.

    Built once for all layers. A model with layers of several kinds takes one mask for each kind.

    Args:
        positions: int64 `[n]`, the column of each row's new token.
    """
    column = torch.arange(columns, device=positions.device)
    here = positions[:, None]
    masks: dict[str, Tensor] = {}
    for pattern in dict.fromkeys(patterns):
        hidden = column > here
        if pattern.window is not None and pattern.window < columns:
            hidden |= column <= here - pattern.window
        mask = torch.zeros(hidden.shape, dtype=dtype, device=positions.device)
        masks[pattern.kind] = mask.masked_fill_(hidden, torch.finfo(dtype).min)[:, None, None]
    return masks if len(masks) > 1 else masks[patterns[0].kind]
