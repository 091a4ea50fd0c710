"""One decoding step of all live rows, from the last tokens to the next: run as it is, or on a GPU recorded and played back.

A step of a small batch is hundreds of short kernels, and launching them from Python takes longer than running them. A CUDA
graph launches all of them at once. It fixes shapes and addresses, so that there is one graph for each number of rows and
columns, both rounded up to powers of two, and the tokens come in through buffers that stay where they are.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, Protocol

import torch
from torch import Tensor

from quartet.errors import brief
from quartet.kernels import Live, Responses, Stretch
from quartet.models.heads import LogitHead
from quartet.models.roles import LanguageView
from quartet.rollout.engine import SamplingSettings
from quartet.rollout.sampling import pick
from quartet.rollout.static_cache import NotDrivable, RowCache
from quartet.rollout.static_decoder import Decoder, rounded

Shape = tuple[int, int, bool]
"""Rows and columns of a recorded step, and whether it is greedy."""
Picked = tuple[Tensor, Tensor]
"""Tokens int64 `[n]`, and float32 `[n]` their log-probabilities in nats."""
AT_ONCE = 16
"""Steps in a row: whoever interrupts a run waits for them."""
FEWEST_COLUMNS = 64
"""Of a recorded step."""


class Steps:
    """Steps run as they are."""

    def __init__(self, decoder: Decoder, head: LogitHead, settings: SamplingSettings, cache: RowCache) -> None:
        self._decoder, self._head, self._settings, self._cache = decoder, head, settings, cache
        self._stretch: list[Stretch | None] = []
        """Looked for once, when there are prompts in the cache."""

    def in_a_row(self, live: Live, kept: Responses, most: int) -> int:
        """Steps of the rows 0 to n - 1 until one stops, up to so many: what they draw is kept, and the rows carried on.

        Returns:
            How many; 0 where steps have to be taken one by one.
        """
        settings = self._settings
        if kept.uniforms is not None and settings.top_p < 1.0:
            return 0
        if not self._stretch:
            self._stretch.append(self._decoder.stretch(self._cache, self._head, settings.temperature))
        found = self._stretch[0]
        return 0 if found is None else found(live, kept, stop=settings.stop_id, most=min(most, AT_ONCE))

    def pick(self, hidden: Tensor, uniform: Tensor | None) -> Picked:
        """Tokens that follow hidden states `[n, H]`; drawn with `uniform` `[n]`, or the most likely ones."""
        settings = self._settings
        return pick(self._head(hidden), uniform, temperature=settings.temperature, top_p=settings.top_p)

    def __call__(self, tokens: Tensor, positions: Tensor, longest: int, uniform: Tensor | None) -> Picked:
        """Append one token to each of the rows 0 to n - 1 of the cache, and give the tokens that follow.

        Args:
            tokens: int64 `[n]`.
            positions: int64 `[n]`, tokens that each row holds already.
            longest: the largest of `positions`, known to the host.
            uniform: float64 `[n]` in [0, 1), or None for the most likely tokens.
        """
        return self.at(tokens, positions, rounded(longest + 1), uniform)

    def at(self, tokens: Tensor, positions: Tensor, columns: int, uniform: Tensor | None) -> Picked:
        """The same, attending over that many columns."""
        return self.pick(self._decoder.step(self._cache, tokens, positions, columns), uniform)


class Recorder(Protocol):
    """Turns work on fixed tensors into something that can be done again."""

    def __call__(self, work: Callable[[], Picked]) -> tuple[Callable[[], None], Picked]:
        """Give what plays the work back, and where its results are then."""
        ...

    def refusing(self) -> AbstractContextManager[None]:
        """In the block, what cannot be recorded for sure is an error, though nothing is recorded."""
        ...


class RecordedSteps(Steps):
    """Steps that are run as they are the first time in a process, recorded once they come again, and played back from then on.

    Rows beyond the live ones are computed along. What they write lies in places of the cache that no row is in, and a
    prompt that comes in writes over it. Once a step cannot be recorded, those of shapes that are not recorded yet are run.
    """

    def __init__(
        self,
        steps: Steps,
        cache: RowCache,
        device: torch.device,
        record: Recorder,
        *,
        seen: set[Shape] | None = None,
        on_failure: Callable[[Exception], None] | None = None,
    ) -> None:
        """
        Args:
            seen: what earlier rollouts of this process have run already; added to.
            on_failure: told why a step cannot be recorded; without it, the error goes up.
        """
        super().__init__(steps._decoder, steps._head, steps._settings, cache)
        self._rows, self._columns = cache.shape
        self._record: Recorder | None = record
        self._on_failure = on_failure
        self._token, self._position = torch.zeros((2, self._rows), dtype=torch.int64, device=device)
        self._uniform = torch.zeros(self._rows, dtype=torch.float64, device=device)
        self._seen = set() if seen is None else seen
        self._known: dict[Shape, tuple[Callable[[], None], Picked]] = {}

    def in_a_row(self, live: Live, kept: Responses, most: int) -> int:
        """None: a step is played back."""
        return 0

    def __call__(self, tokens: Tensor, positions: Tensor, longest: int, uniform: Tensor | None) -> Picked:
        """As `Steps`; the result is overwritten by the next call."""
        count = len(tokens)
        rows, columns = power_of_two(count, self._rows), power_of_two(max(longest + 1, FEWEST_COLUMNS), self._columns)
        for buffer, given in ((self._token, tokens), (self._position, positions), (self._uniform, uniform)):
            if given is not None:
                buffer[:count] = given
                buffer[count:rows] = 0
        next_tokens, logprobs = self._next(rows, columns, uniform is None)
        return next_tokens[:count], logprobs[:count]

    def _next(self, rows: int, columns: int, greedy: bool) -> Picked:
        key = (rows, columns, greedy)
        if key not in self._seen:  # brings in what a library sets up on first use, which cannot be recorded
            self._seen.add(key)
            return self._padded(rows, columns, greedy)
        if key not in self._known:
            if self._record is None:
                return self._padded(rows, columns, greedy)
            try:
                self._decoder.prepare(self._cache)
                self._known[key] = self._record(lambda: self._padded(rows, columns, greedy))
            except Exception as error:
                if self._on_failure is None:
                    raise
                self._record = None
                self._on_failure(error)
                return self._padded(rows, columns, greedy)
        play, result = self._known[key]
        play()
        return result

    def _padded(self, rows: int, columns: int, greedy: bool) -> Picked:
        return self.at(self._token[:rows], self._position[:rows], columns, None if greedy else self._uniform[:rows])


class CudaRecorder:
    """Records with CUDA graphs, which share one pool of memory."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], Picked]) -> tuple[Callable[[], None], Picked]:
        """Record; other threads of the process may go on using the GPU."""
        graph = torch.cuda.CUDAGraph()
        # torch leaves its own stream current, and its allocator waiting for the recording's end, where a recording fails.
        with torch.cuda.stream(torch.cuda.current_stream()):
            try:
                with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                    result = work()
            except Exception:
                self._end()
                raise
        return graph.replay, result

    @contextmanager
    def refusing(self) -> Iterator[None]:
        """Waiting for the GPU is an error: a step that asks it for a number cannot be recorded."""
        before = torch.cuda.get_sync_debug_mode()
        _answer_questions_by("error")
        try:
            yield
        finally:
            _answer_questions_by(before)

    def _end(self) -> None:
        end: Any = getattr(torch._C, "_cuda_endAllocateToPool", None)
        with suppress(RuntimeError):  # it has ended
            if end is not None:
                end(torch.cuda.current_device(), self._pool)


def _answer_questions_by(mode: int | str) -> None:
    with warnings.catch_warnings():  # torch warns that it does not see all questions
        warnings.filterwarnings("ignore", message="Synchronization debug mode")
        torch.cuda.set_sync_debug_mode(mode)


def check_recording(decoder: Decoder, policy: LanguageView, settings: SamplingSettings, record: Recorder) -> None:
    """Run a few steps as they are and recorded, on the same tokens, and compare; greedy ones and ones that draw.

    Raises:
        NotDrivable: recording fails, or gives other log-probabilities.
    """
    tolerance = 1e-3 if policy.backbone.dtype == torch.float32 else 0.1
    held: list[RecordedSteps] = []  # a graph's memory pool cannot be used again once all of its graphs are gone
    for uniform in (None, torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)):
        try:
            expected, (tokens, logprobs) = _checked_steps(decoder, policy, settings, record, uniform, held)
        except Exception as error:
            raise NotDrivable(not_recorded(error)) from error
        if uniform is None:
            off = logprobs - expected.amax(-1)
        else:  # rounding may draw another token; an unlikely one's log-probability is rounded more
            drawn = tokens.clamp(0, expected.shape[-1] - 1)[:, None]
            off = (logprobs - expected.gather(-1, drawn).squeeze(-1)) / 10
        worst = float(off.abs().max())
        if not worst <= tolerance:
            raise NotDrivable(f"a recorded decoding step gives log-probabilities that are off by {worst:.2g} nats")


def _checked_steps(
    decoder: Decoder,
    policy: LanguageView,
    settings: SamplingSettings,
    record: Recorder,
    uniform: Tensor | None,
    held: list[RecordedSteps],
) -> tuple[Tensor, Picked]:
    """Four steps of three rows: log-probabilities `[12, vocabulary]` as they are run, and what the recorded ones pick.

    Args:
        held: the recorded steps are added to it, to live for as long as the recorder does.
    """
    device, start = policy.backbone.device, torch.tensor([3, 5, 7])
    ids = torch.stack([start, start + 1, start + 2]).to(device)
    lengths = torch.full((3,), 3, device=device)
    uniform = None if uniform is None else uniform.to(device)
    cache = decoder.new_cache(4, 8)
    decoder.prefill(cache, 0, ids, lengths)
    expected = []
    for step in range(4):
        hidden = decoder.step(cache, ids[:, 0], lengths + step, rounded(4 + step))
        expected.append((policy.head(hidden).float() / settings.temperature).log_softmax(-1))
    steps = Steps(decoder, policy.head, settings, cache)
    steps(ids[:, 0], lengths + 3, 6, uniform)
    with record.refusing():  # before a recording, which would fail half-way
        steps(ids[:, 0], lengths + 3, 6, uniform)
    cache = decoder.new_cache(4, 8)
    recorded = RecordedSteps(Steps(decoder, policy.head, settings, cache), cache, device, record)
    held.append(recorded)
    decoder.prefill(cache, 0, ids, lengths)
    picked = []
    for step in range(4):
        tokens, logprobs = recorded(ids[:, 0], lengths + step, 3 + step, uniform)
        picked.append((tokens.clone(), logprobs.clone()))
    return torch.cat(expected), (torch.cat([one[0] for one in picked]), torch.cat([one[1] for one in picked]))


def not_recorded(error: Exception) -> str:
    """Why a step is not recorded, in one line."""
    return f"recording a decoding step fails with {type(error).__name__}: {brief(error)}"


def power_of_two(count: int, most: int) -> int:
    """The next power of two, `most` at the most."""
    return min(most, 1 << (count - 1).bit_length())
