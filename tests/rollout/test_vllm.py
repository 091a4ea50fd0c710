"""vLLM as the rollout engine, against the stand-in: the policy of the moment answers, and mistakes end in a sentence."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import vllm_stand_in
from pipeline import Pipeline
from quartet.cli import main
from quartet.config import parse_config
from quartet.distributed import SingleProcess
from quartet.distributed.choose import refuse_impossible
from quartet.errors import ConfigError, RolloutError
from quartet.records import Prompts
from quartet.rewards import endpoint as transport
from quartet.rollout.vllm import Response, VllmEngine
from quartet.run.memory_account import predicted
from quartet.run.setup import read_inputs
from quartet.run.trust import refuse_untrusted
from quartet.trainer import train
from tiny import TinyRun
from vllm_stand_in import MADE, install, serving

LORA = {"models.lora": {"r": 9}}
SAMPLINGS = [(1.0, 1.0), (0.7, 1.0), (1.0, 0.8)]
ColocatedRun = Callable[..., Any]


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    monkeypatch.setattr(transport, "_FIRST_PAUSE", 0.0)
    monkeypatch.delenv("http_proxy", raising=False)


@pytest.mark.parametrize("mode", ["colocate", "server"])
@pytest.mark.parametrize("plan", [{}, LORA], ids=["full", "lora"])
@pytest.mark.parametrize(("temperature", "top_p"), SAMPLINGS)
def test_responses_come_from_the_policy_as_it_is_now(
    tiny_run: TinyRun, library: Any, mode: str, plan: Any, temperature: float, top_p: float
) -> None:
    """vLLM's log-probabilities are training's, in the second iteration too, after the weights have moved."""
    changes: dict[str, Any] = {
        **plan,
        "rollout.engine": "vllm",
        "rollout.vllm": {"mode": mode},
        "rollout.temperature": temperature,
        "rollout.top_p": top_p,
        "ppo.iterations": 2,
        "ppo.learning_rate": 3e-2,
    }
    with ExitStack() as stack:
        if mode == "server":
            wanted = "raw_logprobs" if temperature == 1.0 else "processed_logprobs"
            server = stack.enter_context(serving(str(library.path("llama", "sft")), wanted))
            changes["rollout.vllm"]["url"] = server.url
        run = train(tiny_run(**changes))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["rollout/logprob_gap"] for line in lines] == pytest.approx([0.0, 0.0], abs=1e-4)
    assert lines[1]["kl/reference"] > 0.01, "the case is meant to move the policy"
    if mode == "server":
        pushed = [path for path, _ in server.asked if path in ("/collective_rpc", "/v1/load_lora_adapter")]
        assert len(pushed) == 2
        assert len(server.adapters) == (1 if plan else 0)


def test_the_memory_plan_counts_no_cache(tiny_run: TinyRun) -> None:
    """It is not this process's; the static engine's is counted."""
    own, other = (
        _rollout_peak(tiny_run(**{"rollout.engine": engine, "rollout.batch_rows": 4})) for engine in ("vllm", "static")
    )
    assert 0 < own < other


def test_the_handover_leaves_nothing_behind(tiny_run: TinyRun, tmp_path: Path) -> None:
    folder = tmp_path / "handover"
    folder.mkdir()
    train(tiny_run(**{"rollout.engine": "vllm", "rollout.vllm": {"folder": str(folder)}, "ppo.iterations": 2}))
    assert list(folder.iterdir()) == []


def test_a_handover_folder_in_the_home_folder(
    tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "handover").mkdir()
    before = (tmp_path / "handover").stat().st_mtime_ns
    train(tiny_run(**{"rollout.engine": "vllm", "rollout.vllm": {"folder": "~/handover"}}))
    assert (tmp_path / "handover").stat().st_mtime_ns > before  # something came and went


@pytest.mark.parametrize(
    ("plan", "calls"),
    [
        ({}, ["wake ['weights']", "reload", "wake ['kv_cache']", ("generate", None), "sleep 2"]),
        (LORA, ["wake None", ("generate", 1), "sleep 1", "wake None", ("generate", 2), "sleep 1"]),
    ],
    ids=["full", "lora"],
)
def test_on_a_gpu_it_sleeps_between_rollouts(
    tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch, plan: Any, calls: list[Any]
) -> None:
    """The orders of vLLM's documentation on sleep mode; new weights never meet cached states of old ones."""
    engine, prompts = _engine(tiny_run(**plan))
    monkeypatch.setattr(engine._runner, "_sleeps", True)
    for _ in range(1 + calls.count("wake None") // 2):
        engine.generate(prompts)
    made = MADE[-1].calls
    assert [call[:2] if isinstance(call, tuple) else call for call in made] == calls
    salts = [call[2] for call in made if isinstance(call, tuple)]
    assert len(set(salts)) == len(salts)


def test_torch_gives_back_what_it_holds_before_vllm_wakes(tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, prompts = _engine(tiny_run(**LORA))
    monkeypatch.setattr(engine._runner, "_sleeps", True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: MADE[-1].calls.append("give back"))
    engine.generate(prompts)
    assert MADE[-1].calls[:2] == ["give back", "wake None"]


def test_the_engine_is_started_for_the_run(tiny_run: TinyRun, library: Any) -> None:
    _engine(tiny_run(**LORA, **{"rollout.temperature": 0.5, "data.max_prompt_tokens": 20}))
    made = MADE[-1]
    assert (made.model, made.dtype, made.skip_tokenizer_init) == (str(library.path("llama", "sft")), "float32", True)
    assert (made.max_model_len, made.max_num_seqs, made.gpu_memory_utilization) == (26, 3, 0.3)
    assert (made.enable_lora, made.max_loras, made.max_lora_rank) == (True, 1, 16)
    assert made.logprobs_mode == "processed_logprobs"
    assert not made.enable_sleep_mode


def test_greedy_at_another_temperature_is_refused(tiny_run: TinyRun) -> None:
    engine, prompts = _engine(tiny_run(**{"rollout.temperature": 0.5}))
    with pytest.raises(ConfigError, match=r"greedy responses at a temperature of 1, and rollout\.temperature=0\.5"):
        engine.generate(prompts, greedy=True)


@pytest.mark.parametrize(
    ("tokens", "logprobs", "message"),
    [
        ([], [], "with 0 tokens"),
        ([5], [-1.0], "with 1 tokens"),
        ([5] * 4, [-1.0] * 4, "with 4 tokens"),
        ([5, 5, 5], [-1.0] * 2, "3 tokens and 2 log-probabilities"),
        ([5, 5, 5], [-1.0, float("nan"), -1.0], "log-probabilities that are none"),
        ([5, 5, 5], [-1.0, 7.5, -1.0], "log-probabilities that are none.*--logprobs-mode raw_logprobs"),
    ],
)
def test_other_answers_are_refused(
    tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch, tokens: Any, logprobs: Any, message: str
) -> None:
    engine, prompts = _engine(tiny_run(**{"rollout.response_length": 3}))
    monkeypatch.setattr(engine._runner, "complete", lambda requests: [Response(tokens, logprobs)] * len(requests))
    with pytest.raises(RolloutError, match=message):
        engine.generate(prompts)


class TestMistakes:
    """Each is one sentence and exit code 2."""

    @pytest.fixture
    def said(self, tiny_run: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
        def run(**changes: Any) -> str:
            config = tmp_path / "run.yaml"
            config.write_text(yaml.safe_dump(tiny_run(**{"rollout.engine": "vllm", **changes})))
            capsys.readouterr()  # of writing the checkpoints
            assert main(["train", str(config)]) == 2
            said = capsys.readouterr().err
            assert said.startswith("quartet: ")
            assert said.count("\n") == 1, said
            return said

        return run

    def test_not_installed(self, said: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "vllm", None)
        assert "needs vLLM, which cannot be imported" in said()

    def test_built_for_another_device(self, said: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        install(monkeypatch, device="")
        assert "runs vLLM where the models are (cpu), and the vLLM installed here is for no device" in said()

    def test_does_not_start(self, said: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(self: Any) -> None:
            raise ValueError("no room\nfor the cache")

        monkeypatch.setattr(vllm_stand_in.LLM, "__post_init__", fail)
        assert "vLLM does not start: ValueError: no room for the cache; its own log" in said()

    def test_rank(self, said: Any) -> None:
        assert "models.lora.r=513 is more than vLLM takes, 512" in said(**{"models.lora": {"r": 513}})

    def test_url(self, said: Any) -> None:
        assert "rollout.vllm.mode=server needs rollout.vllm.url" in said(**{"rollout.vllm": {"mode": "server"}})
        assert "is for rollout.vllm.mode=server" in said(**{"rollout.vllm": {"url": "http://localhost:1"}})

    def test_settings_that_no_engine_uses(self, said: Any) -> None:
        for engine in ("auto", "static"):
            text = said(**{"rollout.engine": engine, "rollout.vllm": {"gpu_memory_utilization": 0.5}})
            assert (
                f"rollout.vllm is given, and rollout.engine={engine} does not use it; set rollout.engine=vllm" in text
            )

    def test_temperature_and_top_p(self, said: Any) -> None:
        assert "set one of the two to 1.0" in said(**{"rollout.temperature": 0.5, "rollout.top_p": 0.5})

    def test_folder(self, said: Any) -> None:
        assert "rollout.vllm.folder='/absent' cannot be written to" in said(**{"rollout.vllm": {"folder": "/absent"}})

    def test_unreachable(self, said: Any) -> None:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{unused.getsockname()[1]}"
            assert f"vLLM server {url} failed 4 times" in said(**_server(url))

    def test_another_model(self, said: Any, library: Any) -> None:
        with serving(str(library.path("llama", "sft"))) as server:
            server.path = "another/model"
            assert "serves another/model, and models.sft rests on" in (text := said(**_server(server.url)))
        assert f"start it with: vllm serve {library.path('llama', 'sft')}" in text

    @pytest.mark.parametrize(("mode", "t", "p"), [("raw_logprobs", 0.5, 1.0), ("processed_logprobs", 1.0, 0.5)])
    def test_other_logprobs(self, said: Any, library: Any, mode: str, t: float, p: float) -> None:
        with serving(str(library.path("llama", "sft")), mode) as server:
            text = said(**_server(server.url), **{"rollout.temperature": t, "rollout.top_p": p})
        assert f"gives {mode.split('_')[0]} log-probabilities" in text

    @pytest.mark.parametrize(
        ("plan", "switch"), [(LORA, "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"), ({}, "VLLM_SERVER_DEV_MODE=1")]
    )
    def test_weights_cannot_be_changed(self, said: Any, library: Any, plan: Any, switch: str) -> None:
        with serving(str(library.path("llama", "sft")), lora=False, dev=False) as server:
            text = said(**_server(server.url), **plan)
        assert "with status 404" in text
        assert f"the server has to be started with {switch}" in text

    @pytest.mark.parametrize("answer", ["<html>", "[]", '{"choices": []}', '{"choices": [{"token_ids": null}]}'])
    def test_answers_of_another_form(self, said: Any, library: Any, answer: str) -> None:
        with serving(str(library.path("llama", "sft"))) as server:
            server.change = lambda path, given: (200, answer) if path == "/v1/completions" else given
            assert "where a completion with token_ids and logprobs is wanted; check the server" in said(
                **_server(server.url)
            )

    def test_several_processes(self, tiny_run: TinyRun) -> None:
        config = parse_config(tiny_run(**{"rollout.engine": "vllm"}))
        with pytest.raises(ConfigError, match=r"rollout\.engine=vllm works with a run of one process"):
            refuse_impossible(config, "ddp", 2)

    def test_resuming_from_somebody_elses_folder(self, tiny_run: TinyRun, tmp_path: Path) -> None:
        config = parse_config(tiny_run(**{"rollout.engine": "vllm", **_server("http://elsewhere:8000")}))
        with pytest.raises(ConfigError, match="names the vLLM server http://elsewhere, which resuming would use"):
            refuse_untrusted(config, tmp_path)


def test_the_token_is_sent(tiny_run: TinyRun, library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUARTET_VLLM_TOKEN", "s3cret")
    seen: list[str | None] = []
    reply = vllm_stand_in._Handler._reply

    def note(handler: Any, content: Any) -> None:
        seen.append(handler.headers["Authorization"])
        reply(handler, content)

    monkeypatch.setattr(vllm_stand_in._Handler, "_reply", note)
    with serving(str(library.path("llama", "sft"))) as server:
        _engine(tiny_run(**_server(server.url)))
    assert seen == ["Bearer s3cret"]


def test_the_advice_is_said_once_and_not_where_it_is_followed(
    tiny_run: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tiny_run(**{"rollout.engine": "vllm"}))
    assert capsys.readouterr().out.count("rollout.correct_rollout=true is advised") == 1
    train(tiny_run(**{"rollout.engine": "vllm", "rollout.correct_rollout": True, "run.dir": str(tmp_path / "again")}))
    assert "is advised" not in capsys.readouterr().out


def _rollout_peak(tree: Any) -> float:
    """Predicted bytes of a rollout."""
    config = parse_config(tree)
    inputs = read_inputs(config, lambda line: None)
    return predicted(config, inputs, SingleProcess(), None).phase("rollout").peak


def _server(url: str) -> dict[str, Any]:
    return {"rollout.vllm": {"mode": "server", "url": url}}


def _engine(tree: Any) -> tuple[VllmEngine, Prompts]:
    """The engine of a configuration, and two prompts for it."""
    tree["rollout"]["engine"] = "vllm"
    engine = Pipeline(tree).loaded.rollout
    assert isinstance(engine, VllmEngine)
    return engine, Prompts((4, 5), ("", ""), (torch.tensor([3, 4]), torch.tensor([5])))
