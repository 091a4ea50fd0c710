"""Generation with vLLM: requests as token ids, the policy's weights handed over before each rollout.

vLLM's calls and fields are those of its documentation (https://docs.vllm.ai, 0.32): `features/lora`, `features/sleep_mode`,
`training/layerwise` (reload_weights), `serving/openai_compatible_server`, and `config` (logprobs_mode).
"""

from __future__ import annotations

import math
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from quartet.errors import ConfigError, RolloutError
from quartet.models.adapter_files import adapter_state, save_adapter
from quartet.models.roles import LanguageView
from quartet.records import Prompts, Rollout
from quartet.rollout.engine import SamplingSettings
from quartet.rollout.sampling import episode_seed


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt and how to continue it; the names are those of vLLM's sampling parameters."""

    prompt: list[int]
    max_tokens: int
    temperature: float
    """0 is greedy."""
    top_p: float
    seed: int
    stop_token_ids: list[int]
    cache_salt: str
    """Names the weights, so that cached states of earlier ones are not used."""

    def sampling(self) -> dict[str, Any]:
        """Arguments of vLLM's SamplingParams, and fields of a completion request.

        `ignore_eos`: of the model's own end tokens only the run's stop token counts. `logprobs=0`: the sampled token's alone.
        """
        return {
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": self.seed,
            "stop_token_ids": self.stop_token_ids,
            "ignore_eos": True,
            "logprobs": 0,
        }


@dataclass(frozen=True, slots=True)
class Response:
    """Token ids, the stop token included, and the log-probability of each in nats."""

    tokens: Sequence[int]
    logprobs: Sequence[float]


class VllmRunner(Protocol):
    """Where vLLM runs: in a child process of this run, or as a server."""

    def load(self, folder: Path, label: str) -> None:
        """Take over the policy from a folder: a PEFT adapter, or whole weights. `label` is new each time."""

    def complete(self, requests: Sequence[Request]) -> list[Response]:
        """Responses in the order of the requests."""

    def rest(self) -> None:
        """Nothing is asked until the next `load`."""


def logprobs_mode(settings: SamplingSettings) -> str:
    """vLLM's `logprobs_mode` that gives log softmax(logits / temperature) of a sampled token.

    Raw ones are taken before the temperature, processed ones after top-p has cut the distribution. The configuration
    refuses a temperature and a top-p that are both set.
    """
    return "raw_logprobs" if settings.temperature == 1.0 else "processed_logprobs"


class VllmEngine:
    """Hands the policy to vLLM before each rollout and lays out what comes back.

    vLLM draws with its own generators. Each episode's is seeded from the run's seed and the episode's number, so a response
    depends on nothing else; it is another one than the static and dynamic engines draw.
    """

    def __init__(
        self, policy: LanguageView, settings: SamplingSettings, runner: VllmRunner, *, folder: str | None = None
    ) -> None:
        """`folder` is where adapters and weights are handed over; None takes the system's temporary folder."""
        self._policy, self._settings, self._runner = policy, settings, runner
        try:
            self._root = Path(tempfile.mkdtemp(prefix="quartet-", dir=folder)).resolve()
        except OSError as error:
            raise ConfigError(f"rollout.vllm.folder={folder!r} cannot be written to: {error.strerror}") from error
        weakref.finalize(self, shutil.rmtree, self._root, ignore_errors=True)
        self._pushes = 0

    @torch.no_grad()
    def generate(self, prompts: Prompts, *, greedy: bool = False) -> Rollout:
        """Sample (or decode greedily) one response for each prompt; see `RolloutEngine`.

        `decode_steps` is the longest response less one token: vLLM does not tell how many steps it took.

        Raises:
            ConfigError: greedy decoding at a temperature other than 1, where vLLM gives log-probabilities at 1.
            RolloutError: vLLM fails, or answers something else.
        """
        settings = self._settings
        if greedy and settings.temperature != 1.0:
            raise ConfigError(
                f"rollout.engine=vllm gives the log-probabilities of greedy responses at a temperature of 1, and "
                f"rollout.temperature={settings.temperature}; use rollout.engine=static"
            )
        label = self._push()
        requests = [
            Request(
                prompt=tokens.tolist(),
                max_tokens=settings.response_length,
                temperature=0.0 if greedy else settings.temperature,
                top_p=1.0 if greedy else settings.top_p,
                seed=episode_seed(settings.seed, episode),
                stop_token_ids=[] if settings.stop_id is None else [settings.stop_id],
                cache_salt=label,
            )
            for episode, tokens in zip(prompts.episodes, prompts.tokens, strict=True)
        ]
        responses = self._runner.complete(requests)
        self._runner.rest()
        return self._rollout(prompts, responses)

    def _push(self) -> str:
        """Write the policy to a new folder and have vLLM load it; the folder before is removed."""
        previous, self._pushes = self._root / str(self._pushes), self._pushes + 1
        label, folder = f"{self._root.name}-{self._pushes}", self._root / str(self._pushes)
        try:
            write_policy(self._policy, folder)
        except OSError as error:
            raise RolloutError(
                f"the policy could not be written to {folder} for vLLM ({error.strerror or error}); free some space, or set "
                "rollout.vllm.folder"
            ) from error
        self._runner.load(folder, label)
        shutil.rmtree(previous, ignore_errors=True)
        return label

    def _rollout(self, prompts: Prompts, responses: Sequence[Response]) -> Rollout:
        settings, device = self._settings, self._policy.backbone.device
        shape = (len(prompts), settings.response_length)
        tokens = torch.full(shape, settings.pad_id, dtype=torch.int64)
        logprobs = torch.zeros(shape)
        mask = torch.zeros(shape, dtype=torch.bool)
        stopped = torch.zeros(len(prompts), dtype=torch.bool)
        for row, (episode, response) in enumerate(zip(prompts.episodes, responses, strict=True)):
            length = len(response.tokens)
            _check(response, settings, episode)
            tokens[row, :length] = torch.tensor(response.tokens)
            logprobs[row, :length] = torch.tensor(response.logprobs)
            mask[row, :length] = True
            stopped[row] = settings.stop_id is not None and response.tokens[-1] == settings.stop_id
        return Rollout(
            prompts=prompts,
            tokens=tokens.to(device),
            response_mask=mask.to(device),
            logprobs=logprobs.to(device),
            stopped=stopped.to(device),
            decode_steps=int(mask.sum(-1).max()) - 1,
        )


def _check(response: Response, settings: SamplingSettings, episode: int) -> None:
    length = len(response.tokens)
    early = length < settings.response_length and (length == 0 or response.tokens[-1] != settings.stop_id)
    if early or length > settings.response_length or len(response.logprobs) != length:
        raise RolloutError(
            f"vLLM answered episode {episode} with {length} tokens and {len(response.logprobs)} log-probabilities, where "
            f"rollout.response_length={settings.response_length} tokens or an earlier stop token were asked for"
        )
    if not all(math.isfinite(value) and value <= 1e-3 for value in response.logprobs):
        raise RolloutError(
            f"vLLM answered episode {episode} with log-probabilities that are none (above 0 or not finite); serve it with "
            f"--logprobs-mode {logprobs_mode(settings)}"
        )


def write_policy(policy: LanguageView, folder: Path) -> None:
    """Write what training changes: the adapter in PEFT's layout, or the whole model in its computation dtype."""
    backbone = policy.backbone
    model: Any = backbone.model
    if policy.adapter is not None:
        state = {name: t.detach().cpu().contiguous() for name, t in adapter_state(model, policy.adapter).items()}
        save_adapter(model, policy.adapter, folder, state, base=backbone.spec.checkpoint, task="CAUSAL_LM")
    else:
        model.save_pretrained(folder, state_dict={k: t.to(backbone.dtype) for k, t in model.state_dict().items()})
