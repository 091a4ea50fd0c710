"""vLLM as a server: `vllm serve`, asked over its OpenAI-compatible endpoints and those for changing weights.

The server reads adapters and weights from files, so it has to see the run's folder under the same path. It has to be started
with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True for LoRA (docs: features/lora), and with VLLM_SERVER_DEV_MODE=1
for full fine-tuning, whose weights are read anew through /collective_rpc (docs: features/sleep_mode, training/layerwise).
vLLM's weight transfer over NCCL or CUDA IPC needs no files and a GPU on both sides; it is not used.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from quartet.errors import RolloutError
from quartet.models.roles import LanguageView
from quartet.rewards.endpoint import Endpoint, Temporary
from quartet.rollout.engine import SamplingSettings
from quartet.rollout.vllm import Request, Response, logprobs_mode

TOKEN_VARIABLE = "QUARTET_VLLM_TOKEN"
"""Environment variable with the server's API key."""
UNTOUCHED = {
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
"""Said in every request: the server would else take them from the model's generation_config.json."""


class Served:
    """Asks a running server, one request for each prompt, since a request has one seed."""

    def __init__(
        self, policy: LanguageView, settings: SamplingSettings, url: str, *, timeout: float, names: Sequence[str]
    ) -> None:
        """`names` are those that the server may have for the model; `timeout` is in seconds, for one request.

        Raises RolloutError where the server cannot be reached, serves another model, or gives other log-probabilities.
        """
        self._endpoint = Endpoint(
            url.rstrip("/"), "vLLM server", token_variable=TOKEN_VARIABLE, error=RolloutError, timeout=timeout
        )
        self._adapter = policy.adapter is not None
        self._rows = settings.batch_rows
        self._base = self._model = self._served_model(names)
        self._refuse_other_logprobs(settings)

    def load(self, folder: Path, label: str) -> None:
        """Load the adapter by a new name and drop the one before, or read whole weights in place of those there."""
        if not self._adapter:
            self._post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}})
            return
        previous, self._model = self._model, label
        # In place, so that a second attempt after a lost answer is not refused.
        adapter = {"lora_name": label, "lora_path": str(folder), "load_inplace": True}
        self._post("/v1/load_lora_adapter", adapter)
        if previous != self._base:
            self._post("/v1/unload_lora_adapter", {"lora_name": previous})

    def complete(self, requests: Sequence[Request]) -> list[Response]:
        """Responses in the order of the requests; `batch_rows` requests are on their way at once."""
        with ThreadPoolExecutor(self._rows) as pool:
            return list(pool.map(self._completion, requests))

    def rest(self) -> None:
        """A server has its device to itself."""

    def _completion(self, request: Request, **changes: Any) -> Response:
        content = {
            "model": self._model,
            "prompt": request.prompt,
            "cache_salt": request.cache_salt,
            "return_token_ids": True,
            **UNTOUCHED,
            **request.sampling(),
            **changes,
        }
        return self._endpoint.ask(content, self._read_completion, path="/v1/completions")

    def _read_completion(self, answer: bytes) -> Response:
        try:
            choice = json.loads(answer)["choices"][0]
            tokens = [int(token) for token in choice["token_ids"]]
            return Response(tokens, [float(value) for value in choice["logprobs"]["token_logprobs"]])
        except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
            raise Temporary(
                f"it answered {self._endpoint.quoted(answer)} where a completion with token_ids and logprobs is wanted"
            ) from error

    def _post(self, path: str, content: dict[str, Any]) -> None:
        try:
            self._endpoint.ask(content, lambda answer: None, path=path)
        except RolloutError as error:
            switch = (
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and --enable-lora" if self._adapter else "VLLM_SERVER_DEV_MODE=1"
            )
            raise RolloutError(
                f"{error}; the server has to be started with {switch} and to see the folder of rollout.vllm.folder"
            ) from error

    def _served_model(self, names: Sequence[str]) -> str:
        def read(answer: bytes) -> list[dict[str, Any]]:
            try:
                return [entry for entry in json.loads(answer)["data"] if entry.get("parent") is None]
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise Temporary(
                    f"it answered {self._endpoint.quoted(answer)} where a list of models is wanted"
                ) from error

        models = self._endpoint.ask(None, read, path="/v1/models")
        for entry in models:
            if entry.get("id") in names or entry.get("root") in names:
                return str(entry["id"])
        served = ", ".join(str(entry.get("id")) for entry in models) or "nothing"
        raise RolloutError(
            f"{self._endpoint.label} serves {served}, and models.sft rests on {names[0]!r}; start it with: vllm serve "
            f"{names[0]}, or give it that name with --served-model-name"
        )

    def _refuse_other_logprobs(self, settings: SamplingSettings) -> None:
        """Tell the server's `logprobs_mode` by a token that top-k leaves no alternative: its processed log-probability is 0.

        The mode is fixed when the server starts and named by no endpoint. Without temperature and top-p all modes agree.
        """
        if settings.temperature == 1.0 and settings.top_p == 1.0:
            return
        probe = Request([0], 1, settings.temperature, 1.0, 0, [], "quartet-probe")
        processed = self._completion(probe, top_k=1).logprobs[0] == 0.0
        wanted = logprobs_mode(settings)
        if processed != (wanted == "processed_logprobs"):
            raise RolloutError(
                f"{self._endpoint.label} gives {'processed' if processed else 'raw'} log-probabilities, and "
                f"rollout.temperature={settings.temperature} with rollout.top_p={settings.top_p} needs {wanted}; start it with "
                f"--logprobs-mode {wanted}"
            )
