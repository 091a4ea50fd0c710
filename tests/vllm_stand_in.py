"""A stand-in for vLLM over a transformers model: the part of its documented interface that Quartet uses, and no more.

Names and forms of arguments are those of vLLM 0.32 (https://docs.vllm.ai): an argument that is not there is a TypeError. What a
test learns from it is that requests are formed and answers read as documented, and that the policy of the moment answers;
not that vLLM does what its documentation says.
"""

from __future__ import annotations

import json
import sys
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any, TypedDict

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging


@dataclass(kw_only=True)
class SamplingParams:
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int = 16
    logprobs: int | None = None
    detokenize: bool = True


class TokensPrompt(TypedDict):
    prompt_token_ids: list[int]
    cache_salt: str


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str
    load_inplace: bool = False


@dataclass
class Logprob:
    logprob: float


@dataclass
class CompletionOutput:
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None


@dataclass
class RequestOutput:
    outputs: list[CompletionOutput]


class Model:
    """Weights as vLLM holds them, and its sampling: temperature, then top-k and top-p, then a draw by the request's seed."""

    def __init__(self, path: str, mode: str) -> None:
        self.mode = mode
        self.reload(path)

    def reload(self, weights_path: str) -> None:
        transformers_logging.disable_progress_bar()  # it would be in the output that a test reads
        self.base = AutoModelForCausalLM.from_pretrained(weights_path, dtype=torch.float32).eval()

    @torch.no_grad()
    def complete(self, prompt: list[int], params: SamplingParams, adapter: str | None) -> CompletionOutput:
        model: Any = self.base
        if adapter is not None:
            with warnings.catch_warnings():
                # PEFT asks the model by a name that newer transformers deprecate.
                warnings.simplefilter("ignore", FutureWarning)
                model = PeftModel.from_pretrained(self.base, adapter).eval()
        try:
            return self._draw(model, prompt, params)
        finally:
            if adapter is not None:
                self.base = model.unload()

    def _draw(self, model: Any, prompt: list[int], params: SamplingParams) -> CompletionOutput:
        generator = torch.Generator().manual_seed(params.seed or 0)
        tokens: list[int] = []
        records: list[dict[int, Logprob]] = []
        while len(tokens) < params.max_tokens:
            raw = model(torch.tensor([prompt + tokens])).logits[0, -1].float()
            scaled = raw / params.temperature if params.temperature else raw
            order = scaled.argsort(descending=True)
            shares = scaled[order].softmax(-1)
            keep = shares.cumsum(-1) - shares < params.top_p
            if params.top_k:
                keep[params.top_k :] = False
            cut = scaled.clone()
            cut[order[~keep]] = -torch.inf
            if params.temperature:
                token = int(torch.multinomial(cut.softmax(-1), 1, generator=generator))
            else:
                token = int(raw.argmax())
            answered = raw if self.mode == "raw_logprobs" else cut
            tokens.append(token)
            records.append({token: Logprob(float(answered.log_softmax(-1)[token]))})
            if token in (params.stop_token_ids or ()):
                break
        return CompletionOutput(tokens, None if params.logprobs is None else records)


@dataclass(kw_only=True)
class LLM:
    model: str
    skip_tokenizer_init: bool = False
    trust_remote_code: bool = False
    dtype: str = "auto"
    gpu_memory_utilization: float = 0.92
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    logprobs_mode: str = "raw_logprobs"
    enable_sleep_mode: bool = False
    enforce_eager: bool = False
    enable_lora: bool = False
    max_loras: int = 1
    max_lora_rank: int = 16
    calls: list[Any] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        MADE.append(self)
        self._model = Model(self.model, self.logprobs_mode)
        self._asleep: set[str] = set()

    def generate(
        self,
        prompts: list[TokensPrompt],
        sampling_params: list[SamplingParams],
        *,
        use_tqdm: bool = True,
        lora_request: LoRARequest | None = None,
    ) -> list[RequestOutput]:
        assert not self._asleep
        assert not (lora_request and not self.enable_lora)
        self.calls.append(("generate", lora_request and lora_request.lora_int_id, prompts[0]["cache_salt"]))
        adapter = lora_request.lora_path if lora_request else None
        pairs = zip(prompts, sampling_params, strict=True)
        return [RequestOutput([self._model.complete(p["prompt_token_ids"], s, adapter)]) for p, s in pairs]

    def collective_rpc(self, method: str, timeout: float | None = None, args: tuple = (), kwargs: Any = None) -> list:
        assert "weights" not in self._asleep
        assert method == "reload_weights"
        self.calls.append("reload")
        self._model.reload(**(kwargs or {}))
        return [None]

    def sleep(self, level: int = 1, mode: str = "abort") -> None:
        self.calls.append(f"sleep {level}")
        self._asleep = {"weights", "kv_cache"}

    def wake_up(self, tags: list[str] | None = None) -> bool:
        self.calls.append(f"wake {tags}")
        self._asleep -= set(tags or self._asleep)
        return not self._asleep


MADE: list[LLM] = []
"""Engines made since the stand-in was installed, the newest last."""


def install(patch: pytest.MonkeyPatch, device: str = "cpu") -> None:
    """Let `import vllm` find the stand-in."""
    MADE.clear()
    vllm: Any = types.ModuleType("vllm")
    vllm.LLM, vllm.SamplingParams, vllm.TokensPrompt = LLM, SamplingParams, TokensPrompt
    vllm.platforms = types.ModuleType("vllm.platforms")
    vllm.platforms.current_platform = types.SimpleNamespace(device_type=device)
    vllm.lora = types.ModuleType("vllm.lora")
    vllm.lora.request = types.ModuleType("vllm.lora.request")
    vllm.lora.request.LoRARequest = LoRARequest
    for module in (vllm, vllm.platforms, vllm.lora, vllm.lora.request):
        patch.setitem(sys.modules, module.__name__, module)


class Server(ThreadingHTTPServer):
    """`vllm serve` as far as Quartet asks: models, completions, adapters by path, weights by path."""

    daemon_threads = True

    def __init__(self, path: str, mode: str = "raw_logprobs", *, lora: bool = True, dev: bool = True) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.path, self.lora, self.dev = path, lora, dev
        self.model = Model(path, mode)
        self.adapters: dict[str, str] = {}
        self.asked: list[tuple[str, Any]] = []
        self.change: Any = lambda path, answer: answer
        self.lock = Lock()

    def answer(self, path: str, content: Any) -> tuple[int, Any]:
        """Status and answer."""
        self.asked.append((path, content))
        if path == "/v1/models":
            base = {"id": self.path, "object": "model", "root": self.path, "parent": None}
            adapters = [{"id": name, "root": root, "parent": self.path} for name, root in self.adapters.items()]
            return 200, {"object": "list", "data": [base, *adapters]}
        if path == "/v1/load_lora_adapter" and self.lora:
            assert content.keys() == {"lora_name", "lora_path", "load_inplace"}
            self.adapters[content["lora_name"]] = content["lora_path"]
            return 200, f"Success: LoRA adapter '{content['lora_name']}' added successfully."
        if path == "/v1/unload_lora_adapter" and self.lora:
            del self.adapters[content["lora_name"]]
            return 200, "Success"
        if path == "/collective_rpc" and self.dev:
            assert content["method"] == "reload_weights"
            self.model.reload(**content["kwargs"])
            return 200, {"results": [None]}
        if path == "/v1/completions":
            return 200, self._completion(content)
        return 404, {"detail": "Not Found"}

    def _completion(self, content: dict[str, Any]) -> Any:
        name, prompt = content.pop("model"), content.pop("prompt")
        assert content.pop("return_token_ids") is True
        assert content.pop("cache_salt")
        neutral = {
            key: content.pop(key) for key in ("min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
        }
        assert neutral == {"min_p": 0, "repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0}
        adapter = None if name == self.path else self.adapters[name]
        output = self.model.complete(prompt, SamplingParams(**content), adapter)
        values = [record[token].logprob for token, record in zip(output.token_ids, output.logprobs or (), strict=True)]
        choice = {"index": 0, "text": "", "token_ids": output.token_ids, "logprobs": {"token_logprobs": values}}
        return {"object": "text_completion", "choices": [choice]}


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self._reply(None)

    def do_POST(self) -> None:
        self._reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _reply(self, content: Any) -> None:
        with self.server.lock:
            status, answer = self.server.change(self.path, self.server.answer(self.path, content))
        body = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_arguments: Any) -> None:
        """Nothing to the terminal."""


@contextmanager
def serving(path: str, mode: str = "raw_logprobs", **options: bool) -> Iterator[Server]:
    """A server on 127.0.0.1 while the block runs."""
    server = Server(path, mode, **options)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
