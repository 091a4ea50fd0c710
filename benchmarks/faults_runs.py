"""Runs of a tiny model in forked processes, and what is left of them on disk."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import sys
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar

ITERATIONS, SAVE_EVERY = 6, 2
CLOCKS = ("time/", "memory/")


class Bench:
    """The inputs, an undisturbed run, and the runs that something is done to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._seconds = 0.0
        self._server = 0

    def __enter__(self) -> Bench:
        import torch

        torch.set_num_threads(1)
        os.environ["QUARTET_CACHE"] = str(self.folder / "cache")
        sys.path.insert(0, str(Path(__file__).parent))
        # What a run imports is imported once, here; gradients are only ever computed in the children.
        import quartet.cli
        import quartet.trainer  # noqa: F401

        self._port = self._serve()
        if self._fork(lambda: write_inputs(self.folder), self.folder / "inputs.log") != 0:
            raise SystemExit((self.folder / "inputs.log").read_text())
        self.whole = self.new_run("whole")
        started = time.monotonic()
        if self.start(self.whole) != 0:
            raise SystemExit(self.said(self.whole))
        self._seconds = time.monotonic() - started
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.kill(self._server, signal.SIGKILL)
        os.waitpid(self._server, 0)

    def seconds_of_a_run(self) -> float:
        """Of the undisturbed one, start to end."""
        return self._seconds

    def new_run(self, name: str) -> Path:
        """A folder for a run; nothing is there yet."""
        return self.folder / "runs" / name

    def copy_of_whole(self, name: str) -> Path:
        """The undisturbed run under another name."""
        return Path(shutil.copytree(self.whole, self.new_run(name)))

    def start(
        self,
        run: Path,
        prepare: Any = None,
        *arguments: str,
        kill_after: float | None = None,
        signal_number: int = signal.SIGKILL,
        only_while_training: bool = False,
    ) -> int:
        """Train, or resume where a run is; the exit code, negative for a signal that ended it."""

        def child() -> int:
            from quartet.cli import main

            if prepare is not None:
                prepare()
            if (run / "config.yaml").is_file():
                return main(["resume", str(run), *arguments])
            shutil.rmtree(run, ignore_errors=True)
            overrides = [a.replace("PORT", str(self._port)) for a in arguments]
            return main(["train", str(self.folder / "run.yaml"), f"run.dir={run}", *overrides])

        run.parent.mkdir(parents=True, exist_ok=True)
        log = run.with_name(run.name + ".log")
        waiting = run / "metrics.jsonl" if only_while_training else None
        return self._fork(child, log, kill_after, signal_number, waiting)

    def _fork(
        self,
        child: Any,
        log: Path,
        kill_after: float | None = None,
        number: int = signal.SIGKILL,
        waiting: Path | None = None,
    ) -> int:
        sys.stdout.flush()
        process = os.fork()
        if process == 0:
            code = 70
            with contextlib.suppress(BaseException):
                stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(stream, 1)
                os.dup2(stream, 2)
                code = child() or 0
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
        if kill_after is not None:
            deadline = time.monotonic() + kill_after
            while time.monotonic() < deadline or (waiting is not None and not waiting.is_file()):
                ended, status = os.waitpid(process, os.WNOHANG)
                if ended:
                    return os.waitstatus_to_exitcode(status)
                time.sleep(0.005)
            os.kill(process, number)
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])

    def said(self, run: Path) -> str:
        """What the last command of a run printed."""
        return run.with_name(run.name + ".log").read_text(errors="replace")

    def finish(self, run: Path, problems: list[str], *arguments: str, compared: bool = True) -> None:
        """Resume a run without a fault; afterwards it is whole, and the undisturbed one where `compared`."""
        code = self.start(run, None, *arguments)
        if code != 0:
            problems.append(f"{run.name} could not be resumed: exit {code}: {self.said(run)[-300:]}")
        elif compared:
            self.compare(run, problems)
        elif self.iterations_done(run) != ITERATIONS or self.unreadable(run):
            problems.append(f"{run.name} is not whole after resuming")

    def compare(self, run: Path, problems: list[str]) -> None:
        """Metrics and weights, bit by bit."""
        if _computed(run) != _computed(self.whole) or _weights(run) != _weights(self.whole):
            problems.append(f"{run.name} differs from the undisturbed run")

    def iterations_done(self, run: Path) -> int:
        """Lines of metrics.jsonl that are whole."""
        file = run / "metrics.jsonl"
        return file.read_bytes().count(b"\n") if file.is_file() else 0

    def newest_checkpoint(self, run: Path) -> int:
        """Its iteration; 0 for none."""
        from quartet.run.checkpoint_folder import list_checkpoints, step_of

        found = list_checkpoints(run / "checkpoints")
        return step_of(found[-1]) if found else 0

    def unreadable(self, run: Path) -> int:
        """Files of checkpoints that do not agree with their manifest, and lines of metrics that are missing."""
        from quartet.errors import CheckpointError
        from quartet.run.checkpoint import FILES
        from quartet.run.checkpoint_folder import list_checkpoints, verify

        bad = 0
        for checkpoint in list_checkpoints(run / "checkpoints"):
            try:
                verify(checkpoint, FILES)
            except CheckpointError:
                bad += 1
        numbers = [record["iteration"] for record in _records(run)]
        return bad + (numbers != list(range(1, len(numbers) + 1)))

    def checkpoint_sizes(self) -> dict[str, int]:
        """Bytes of a checkpoint's files, by name."""
        folder = self.whole / "checkpoints" / f"step-{ITERATIONS:06d}"
        return {path.name: path.stat().st_size for path in folder.iterdir()}

    def _serve(self) -> int:
        server = HTTPServer(("127.0.0.1", 0), Endpoint)
        self._server = os.fork()
        if self._server == 0:
            server.serve_forever()
        server.server_close()
        return server.server_port


class Endpoint(BaseHTTPRequestHandler):
    """Answers by path, each wrong in its own way from its sixth request on, for as many as a run tries."""

    seen: ClassVar[Counter[str]] = Counter()

    def do_POST(self) -> None:
        """Read the request, answer it wrongly if it is time."""
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        kind = self.path.strip("/")
        self.seen[kind] += 1
        wrong = 6 <= self.seen[kind] < (7 if kind == "redirect" else 10)
        if wrong and kind == "slow":
            time.sleep(1.5)
        status = {"500": 500, "redirect": 302}.get(kind, 200) if wrong else 200
        good = json.dumps({"rewards": [len(text) for text in request["responses"]]}).encode()
        body = {"500": b"out of order", "garbage": b"<html>hello"}.get(kind, good) if wrong else good
        with contextlib.suppress(OSError):
            self.send_response(status)
            if status == 302:
                self.send_header("Location", "http://127.0.0.1:1/")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def _records(run: Path) -> list[dict[str, float]]:
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _computed(run: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in record.items() if not k.startswith(CLOCKS)} for record in _records(run)]


def _weights(run: Path) -> list[str]:
    files = [run / role / "model.safetensors" for role in ("policy", "value")]
    return [hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else "" for file in files]


def write_inputs(folder: Path) -> int:
    """Two tiny checkpoints with random weights and a byte-level tokenizer, prompts, and run.yaml."""
    import torch
    import yaml
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        LlamaConfig,
        PreTrainedTokenizerFast,
    )

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({character: index for index, character in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<pad>", "<eos>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>")
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config = LlamaConfig(
        **sizes, vocab_size=258, max_position_embeddings=64, num_labels=1, pad_token_id=256, eos_token_id=257
    )
    config.initializer_range = 0.3
    torch.manual_seed(0)
    for name, kind in (("sft", AutoModelForCausalLM), ("reward", AutoModelForSequenceClassification)):
        kind.from_config(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "prompts.txt").write_text(
        "".join(f"{word}\n" for word in ("a", "to be", "why?", "q 12", "one two", "zz"))
    )
    values = {
        "models": {"sft": str(folder / "sft"), "reward": str(folder / "reward"), "dtype": "float32", "device": "cpu"},
        "data": {"prompts": str(folder / "prompts.txt"), "eval_count": 1},
        "rollout": {"batch_size": 4, "response_length": 8, "batch_rows": 4},
        "ppo": {"iterations": ITERATIONS, "epochs": 2, "minibatches": 2, "microbatch_rows": 2, "learning_rate": 1e-3},
        "run": {"save_every": SAVE_EVERY, "keep": 2, "eval_every": 1},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    return 0
