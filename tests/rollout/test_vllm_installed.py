"""Training with the real vLLM, where it is installed: it answers with the policy as it is now."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from checkpoints import write_model
from quartet.trainer import train
from tiny import TinyRun

pytestmark = [
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.timeout(1200),
    pytest.mark.filterwarnings("default"),
]
WIDE = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 96}
"""vLLM's attention needs heads of at least 32 features."""


@pytest.mark.parametrize("mode", ["colocate", "server"])
@pytest.mark.parametrize(
    ("plan", "sampling"),
    [({"models.lora": {"r": 8}}, {"rollout.temperature": 0.7}), ({}, {"rollout.top_p": 0.8})],
    ids=["lora", "full"],
)
def test_responses_come_from_the_policy_as_it_is_now(
    tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, plan: Any, sampling: Any
) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    write_model(tmp_path / "sft", "llama", seed=1, **WIDE)
    write_model(tmp_path / "reward", "llama", task="classifier", seed=2, **WIDE)
    tree = tiny_run(
        **plan,
        **sampling,
        **{
            "models.sft": str(tmp_path / "sft"),
            "models.reward": str(tmp_path / "reward"),
            "rollout.engine": "vllm",
            "rollout.vllm": {"mode": mode, "gpu_memory_utilization": 0.05},
            "ppo.iterations": 2,
            "ppo.learning_rate": 3e-2,
        },
    )
    if mode == "server":
        with _serving(tmp_path / "sft", raw=not plan) as tree["rollout"]["vllm"]["url"]:
            run = train(tree)
    else:
        run = train(tree)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["rollout/logprob_gap"] for line in lines] == pytest.approx([0.0, 0.0], abs=1e-4)
    assert lines[1]["kl/reference"] > 0.01, "the case is meant to move the policy"


@contextmanager
def _serving(model: Path, *, raw: bool) -> Iterator[str]:
    """`vllm serve`, as docs/rollout.md starts it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mode = "raw_logprobs" if raw else "processed_logprobs"
    options = (
        f"--host 127.0.0.1 --port {port} --logprobs-mode {mode} --dtype float32 --max-model-len 64 --enforce-eager"
    )
    lora = "" if raw else " --enable-lora --max-lora-rank 8"
    switches = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_SERVER_DEV_MODE": "1"}
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(model), *(options + lora).split()]
    with (model.parent / "server.log").open("w") as log:
        server = subprocess.Popen(command, env={**os.environ, **switches}, stdout=log, stderr=log)
        try:
            url = f"http://127.0.0.1:{port}"
            while not _answers(url):
                assert server.poll() is None, (model.parent / "server.log").read_text()[-3000:]
                time.sleep(1.0)
            yield url
        finally:
            server.terminate()
            server.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5):
            return True
    except OSError:
        return False
