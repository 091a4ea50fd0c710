"""Generation with a preallocated cache: a row that stops makes room for the next prompt."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from quartet.kernels import Live, Responses
from quartet.models.roles import LanguageView
from quartet.models.transfer import to_device
from quartet.records import Prompts, Rollout
from quartet.rollout.engine import SamplingSettings
from quartet.rollout.sampling import episode_uniforms
from quartet.rollout.static_cache import NotDrivable, RowCache
from quartet.rollout.static_decoder import Decoder, check, generating
from quartet.rollout.steps import Picked, RecordedSteps, Recorder, Shape, Steps, check_recording, not_recorded

PREFILL_TOKENS = 4096
"""Most tokens, padding included, of one forward pass over prompts."""
REFILL_SHARE = 8
"""Prompts wait until one in so many rows is free."""

_log = logging.getLogger("quartet")


@dataclass
class _Responses:
    """The rollout's tensors while they fill."""

    tokens: Tensor
    mask: Tensor
    logprobs: Tensor
    uniforms: Tensor | None
    decode_steps: int = 0


@dataclass
class _Rows:
    """The rows that are being decoded: slots 0 to n - 1 of the cache."""

    cache: RowCache
    episode: Tensor
    """int64 `[batch rows]`: place of each slot's prompt in the rollout."""
    position: Tensor
    """int64 `[batch rows]`: tokens in the cache."""
    step: Tensor
    """int64 `[batch rows]`: response tokens sampled."""
    token: Tensor
    """int64 `[batch rows]`: the last of them, not yet in the cache."""
    clock: int = 0
    """Decode steps so far; with the lists below, the host knows every length without asking the device."""
    born: list[int] = field(default_factory=list)
    """For each live slot, the clock when its prompt came in."""
    prompt: list[int] = field(default_factory=list)
    """For each live slot, its prompt's length."""

    @property
    def live(self) -> int:
        return len(self.born)

    @property
    def longest(self) -> int:
        """The largest `position` of a live slot."""
        return self.clock + max(p - b for p, b in zip(self.prompt, self.born, strict=True))


class StaticEngine:
    """Decodes up to `batch_rows` rows at once and refills the places of rows that stopped.

    Every row's tokens stand in columns 0, 1, ... of its own row of the cache, whatever the other rows do, so that nothing
    is padded on the left, copied to grow, or moved but the rows that fill holes.

    Raises:
        NotDrivable: this model cannot be decoded so; `DynamicEngine` can.
    """

    def __init__(self, policy: LanguageView, settings: SamplingSettings, *, merged: bool = False) -> None:
        """
        Args:
            merged: generate with copies of the weights to which the policy's adapter is added.
        """
        self._merged = merged
        self._policy = policy
        self._settings = settings
        self._decoder = Decoder(policy)
        self._recorder: Callable[[], Recorder] | None = None
        self._say: Callable[[str], None] = print
        self._seen: set[Shape] = set()
        self._call = tokens_of_a_call(policy)
        decoder = self._decoder
        with generating(policy, merged=merged):
            for decoder.compiles in (False, True):
                try:
                    check(decoder, policy)
                except NotDrivable as error:
                    if not decoder.compiles:
                        raise
                    decoder.compiles = False
                    _log.warning("The compiled decoding step is not used, rollouts take longer: %s", error)

    def record_with(self, recorder: Callable[[], Recorder], say: Callable[[str], None] = print) -> None:
        """Record decoding steps and play them back.

        Args:
            recorder: what it gives serves one rollout, since weights may lie elsewhere in the next.
            say: told in one line if a step cannot be recorded later on; from then on all are run as they are.

        Raises:
            NotDrivable: a step of this model cannot be recorded, or gives something else when it is played back.
        """
        with torch.no_grad(), generating(self._policy, merged=self._merged):
            check_recording(self._decoder, self._policy, self._settings, recorder())
        self._recorder, self._say = recorder, say

    def _stop_recording(self, error: Exception) -> None:
        self._recorder = None
        self._say(f"rollout.cuda_graphs is off from here on: {not_recorded(error)}")

    @torch.no_grad()
    def generate(self, prompts: Prompts, *, greedy: bool = False) -> Rollout:
        """Sample (or decode greedily) one response for each prompt; see `RolloutEngine`."""
        settings, device = self._settings, self._policy.backbone.device
        shape = len(prompts), settings.response_length
        uniforms = None if greedy else episode_uniforms(settings.seed, prompts.episodes, shape[1]).to(device)
        out = _Responses(
            tokens=torch.full(shape, settings.pad_id, device=device),
            mask=torch.zeros(shape, dtype=torch.bool, device=device),
            logprobs=torch.zeros(shape, device=device),
            uniforms=uniforms,
        )
        with generating(self._policy, merged=self._merged):
            self._decode(prompts, out)
        if settings.stop_id is None:
            stopped = torch.zeros(len(prompts), dtype=torch.bool, device=device)
        else:
            stopped = ((out.tokens == settings.stop_id) & out.mask).any(-1)
        return Rollout(
            prompts=prompts,
            tokens=out.tokens,
            response_mask=out.mask,
            logprobs=out.logprobs,
            stopped=stopped,
            decode_steps=out.decode_steps,
        )

    def _decode(self, prompts: Prompts, out: _Responses) -> None:
        lengths = [len(tokens) for tokens in prompts.tokens]
        waiting = sorted(range(len(prompts)), key=lambda row: -lengths[row])
        size = min(self._settings.batch_rows, len(prompts))
        rows = self._empty_rows(size, max(lengths) + self._settings.response_length)
        steps = Steps(self._decoder, self._policy.head, self._settings, rows.cache)
        if self._recorder is not None:
            device, recorder = self._policy.backbone.device, self._recorder()
            steps = RecordedSteps(steps, rows.cache, device, recorder, seen=self._seen, on_failure=self._stop_recording)
        while waiting or rows.live:
            free = size - rows.live
            if waiting and (not rows.live or free >= max(1, size // REFILL_SHARE)):
                for group in like_length([lengths[row] for row in waiting[:free]], self._call):
                    self._admit(rows, prompts, waiting[:group], steps, out)
                    del waiting[:group]
                continue
            live = slice(0, rows.live)
            taken = self._in_a_row(rows, live, steps, out)
            if taken:
                rows.clock += taken
                out.decode_steps += taken
                self._end(rows, live, rows.token[live])
                continue
            uniform = self._uniform(rows, live, out)
            picked = steps(rows.token[live], rows.position[live], rows.longest, uniform)
            rows.clock += 1
            rows.position[live] += 1
            out.decode_steps += 1
            self._keep(rows, live, picked, out)

    def _in_a_row(self, rows: _Rows, live: slice, steps: Steps, out: _Responses) -> int:
        """Steps taken at once, after which a row may be done; 0 where they have to be taken one by one."""
        state = Live(rows.token[live], rows.position[live], rows.step[live], rows.episode[live])
        kept = Responses(out.tokens, out.logprobs, out.mask, out.uniforms)
        left = self._settings.response_length - 1 - (rows.clock - min(rows.born))
        return steps.in_a_row(state, kept, left)

    def _empty_rows(self, size: int, columns: int) -> _Rows:
        device = self._policy.backbone.device
        state = torch.zeros((4, size), dtype=torch.int64, device=device)
        return _Rows(self._decoder.new_cache(size, columns), *state)

    def _admit(self, rows: _Rows, prompts: Prompts, chosen: list[int], steps: Steps, out: _Responses) -> None:
        """Prefill waiting prompts into the slots after the live ones and sample their first tokens."""
        device = rows.token.device
        texts = [prompts.tokens[row] for row in chosen]
        host = nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=self._settings.pad_id)
        ids = to_device(host, device)
        lengths = to_device(torch.tensor([len(text) for text in texts]), device)
        slots = slice(rows.live, rows.live + len(chosen))
        hidden = self._decoder.prefill(rows.cache, slots.start, ids, lengths)
        rows.episode[slots] = to_device(torch.tensor(chosen), device)
        rows.position[slots] = lengths
        rows.step[slots] = 0
        rows.born += [rows.clock] * len(chosen)
        rows.prompt += [len(text) for text in texts]
        self._keep(rows, slots, steps.pick(hidden, self._uniform(rows, slots, out)), out)

    def _uniform(self, rows: _Rows, slots: slice, out: _Responses) -> Tensor | None:
        """The random numbers of some slots' next tokens."""
        return None if out.uniforms is None else out.uniforms[rows.episode[slots], rows.step[slots]]

    def _keep(self, rows: _Rows, slots: slice, picked: Picked, out: _Responses) -> None:
        """Keep a token for each of some slots, and release the slots that are done."""
        place = rows.episode[slots], rows.step[slots]
        tokens, logprobs = picked
        out.tokens[place] = tokens
        out.logprobs[place] = logprobs
        out.mask[place] = True
        rows.token[slots] = tokens
        rows.step[slots] += 1
        self._end(rows, slots, tokens)

    def _end(self, rows: _Rows, slots: slice, tokens: Tensor) -> None:
        """Release those of some slots that are done with their last tokens."""
        settings = self._settings
        done = {slot for slot in range(slots.start, slots.stop) if self._is_full(rows, slot)}
        if settings.stop_id is not None:  # the one question to the device in a step
            stopped: list[bool] = (tokens == settings.stop_id).tolist()
            done.update(slots.start + place for place, stops in enumerate(stopped) if stops)
        if done:
            _release(rows, done)

    def _is_full(self, rows: _Rows, slot: int) -> bool:
        return rows.clock - rows.born[slot] + 1 == self._settings.response_length


def _release(rows: _Rows, done: set[int]) -> None:
    """Take slots out; the last live ones move into the holes."""
    left = rows.live - len(done)
    holes = sorted(slot for slot in done if slot < left)
    movers = [slot for slot in range(left, rows.live) if slot not in done]
    if holes:
        columns = rows.clock + max(rows.prompt[slot] - rows.born[slot] for slot in movers)
        target, source = to_device(torch.tensor([holes, movers]), rows.token.device)
        rows.cache.move(source, target, columns)
        for state in (rows.episode, rows.position, rows.step, rows.token):
            state[target] = state[source]
        for hole, mover in zip(holes, movers, strict=True):
            rows.born[hole], rows.prompt[hole] = rows.born[mover], rows.prompt[mover]
    del rows.born[left:], rows.prompt[left:]


def tokens_of_a_call(policy: LanguageView) -> int:
    """Tokens that take about as long as a forward pass over prompts does beside them: weights read and packed, calls made.

    Tried out in float32, on two cores of an AMD processor. The others were not measured: the faster tokens are, the more of
    them a pass is worth.
    """
    backbone = policy.backbone
    if backbone.device.type != "cpu":
        return 1024
    return 96 if backbone.dtype == torch.float32 else 256


def like_length(lengths: list[int], call: int) -> list[int]:
    """Sizes of consecutive groups to prefill together, so that padding and calls cost the least.

    Args:
        lengths: of the prompts in order, longest first.
        call: tokens that take as long as a forward pass does beside its tokens.

    Returns:
        Group sizes; a group holds at most `PREFILL_TOKENS` places (a single longer prompt stands alone).
    """
    least, first = [0.0], [0]  # of the prompts up to each: what they cost, and where their last group begins
    for end in range(1, len(lengths) + 1):
        found, chosen = math.inf, end
        for start in range(end - 1, -1, -1):
            places = (end - start) * lengths[start]
            if places > PREFILL_TOKENS and start < end - 1:
                break
            if least[start] + places + call < found:
                found, chosen = least[start] + places + call, start
        least.append(found)
        first.append(chosen)
    groups: list[int] = []
    end = len(lengths)
    while end:
        groups.insert(0, end - first[end])
        end = first[end]
    return groups
