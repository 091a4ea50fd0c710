"""vLLM on the device of the models: an `LLM` of this run, whose engine vLLM puts into a child process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from quartet.errors import RolloutError
from quartet.models.roles import LanguageView
from quartet.rollout.engine import SamplingSettings
from quartet.rollout.vllm import Request, Response, logprobs_mode

T = TypeVar("T")
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM takes for `max_lora_rank`."""


class Colocated:
    """Generates in turns with training: on a GPU it sleeps in between and holds next to none of the device's memory then.

    Asleep, an engine under LoRA keeps the base's weights in host memory (level 1); in full fine-tuning they are dropped
    (level 2), since the next rollout brings new ones.
    """

    def __init__(
        self, policy: LanguageView, settings: SamplingSettings, *, share: float, tokens: int, trust_remote_code: bool
    ) -> None:
        """`share` of the device's memory is vLLM's; `tokens` are the most of a prompt and its response.

        Raises RolloutError where vLLM is not installed, is built for another device, or does not start.
        """
        backbone = policy.backbone
        vllm = _installed(backbone.device.type)
        self._adapter = policy.adapter
        self._sleeps = backbone.device.type == "cuda"  # vLLM's sleep mode is for GPUs
        self._lora: Any = None
        self._pushes = 0
        longest = getattr(backbone.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        options: dict[str, Any] = {
            "model": backbone.spec.checkpoint,
            "skip_tokenizer_init": True,
            "trust_remote_code": trust_remote_code,
            "dtype": str(backbone.dtype).removeprefix("torch."),
            "gpu_memory_utilization": share,
            "max_model_len": min(tokens, longest or tokens),
            "max_num_seqs": settings.batch_rows,
            "logprobs_mode": logprobs_mode(settings),
            "enable_sleep_mode": self._sleeps,
            # On the CPU vLLM would compile for minutes at each start.
            "enforce_eager": backbone.device.type == "cpu",
        }
        if self._adapter is not None:
            options |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": _lora_rank(backbone.model, self._adapter)}
        self._llm = _tried("does not start", lambda: vllm.LLM(**options))

    def load(self, folder: Path, label: str) -> None:
        """An adapter is asked for under a new number and name; whole weights are read in place of those that are there."""
        if self._adapter is None:
            self._wake(["weights"])
            reload = {"weights_path": str(folder)}
            _tried("does not load the policy", lambda: self._llm.collective_rpc("reload_weights", kwargs=reload))
            self._wake(["kv_cache"])
            return
        from vllm.lora.request import LoRARequest

        self._wake(None)
        self._pushes += 1
        self._lora = LoRARequest(lora_name=label, lora_int_id=self._pushes, lora_path=str(folder))

    def complete(self, requests: Sequence[Request]) -> list[Response]:
        """Responses in the order of the requests."""
        from vllm import SamplingParams, TokensPrompt

        prompts = [TokensPrompt(prompt_token_ids=one.prompt, cache_salt=one.cache_salt) for one in requests]
        sampling = [SamplingParams(**one.sampling(), detokenize=False) for one in requests]
        results = _tried(
            "does not generate",
            lambda: self._llm.generate(prompts, sampling, use_tqdm=False, lora_request=self._lora),
        )
        return [_response(result.outputs[0]) for result in results]

    def rest(self) -> None:
        """Give the device's memory back until the next `load`."""
        if self._sleeps:
            self._llm.sleep(level=2 if self._adapter is None else 1)

    def _wake(self, tags: list[str] | None) -> None:
        if self._sleeps:
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()  # what torch keeps for later is not there for vLLM
            self._llm.wake_up(tags=tags)


def _response(output: Any) -> Response:
    """vLLM gives for each token a mapping from token id to its record."""
    tokens = list(output.token_ids)
    entries = zip(tokens, output.logprobs or (), strict=False)
    return Response(tokens, [float(records[token].logprob) for token, records in entries])


def _installed(device: str) -> Any:
    try:
        import vllm
        from vllm.platforms import current_platform
    except ImportError as error:
        raise RolloutError(
            f"rollout.engine=vllm needs vLLM, which cannot be imported ({' '.join(str(error).split())[:200]}); pip install "
            "quartet-rlhf[vllm], or use rollout.vllm.mode=server, or rollout.engine=auto without rollout.vllm"
        ) from error
    if current_platform.device_type != device:
        found = current_platform.device_type or "no device that it knows"
        raise RolloutError(
            f"rollout.vllm.mode=colocate runs vLLM where the models are ({device}), and the vLLM installed here is for "
            f"{found}; use rollout.vllm.mode=server, or rollout.engine=auto without rollout.vllm"
        )
    return vllm


def _lora_rank(model: Any, adapter: str) -> int:
    rank: int = model.peft_config[adapter].r
    fitting = [size for size in LORA_RANKS if size >= rank]
    if not fitting:
        raise RolloutError(f"models.lora.r={rank} is more than vLLM takes, {LORA_RANKS[-1]}; use a lower rank")
    return fitting[0]


def _tried(failure: str, call: Callable[[], T]) -> T:
    try:
        return call()
    except Exception as error:
        raise RolloutError(
            f"vLLM {failure}: {type(error).__name__}: {' '.join(str(error).split())[:300]}; its own log above says more"
        ) from error
