"""Wall and CPU seconds and peak memory of the phases of a process.

Standard library only (torch in one function), because the peer's scripts import it too, in an environment of their own.
"""

from __future__ import annotations

import json
import re
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
LORA_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA_RANK, LORA_ALPHA = 16, 32


def status_bytes(field: str) -> int:
    """A size in /proc/self/status: VmHWM (peak resident), VmRSS (resident), RssAnon (resident, backed by no file)."""
    found = re.search(rf"^{field}:\s+(\d+) kB", STATUS.read_text(), flags=re.MULTILINE)
    if found is None:
        raise SystemExit(f"{STATUS} has no {field}; the benchmarks' memory figures need Linux")
    return int(found[1]) * 1024


def reset_peak() -> None:
    """Begin a new peak of the resident set (5 in proc_pid_clear_refs(5)); where the kernel does not permit it, as in some
    containers, peaks are those since the process started."""
    with suppress(OSError):
        CLEAR_REFS.write_text("5")


def warm_up() -> None:
    """Start the thread pools, and bring in what the first passes of a small Llama bring in: it belongs to the libraries."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
    ids = torch.ones(2, 8, dtype=torch.long)
    model(input_ids=ids, labels=ids).loss.backward()
    torch.optim.AdamW(model.parameters(), fused=True).step()


def settle(device: str) -> None:
    """Wait until a GPU has done what it was given, so that its time falls into the phase that gave it."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


class Probe:
    """Figures of one phase after another, over a floor taken when the libraries are imported.

    Args:
        sample: also sample anonymous memory every 2 ms, from a thread; off where time is measured.
    """

    def __init__(self, *, sample: bool) -> None:
        self.phases: dict[str, dict[str, float]] = {}
        self._name: str | None = None
        self._start = self._cpu = 0.0
        self._anonymous = 0
        self._sampling = sample
        self.floor = {"resident": status_bytes("VmRSS"), "anonymous": status_bytes("RssAnon")}
        if sample:
            threading.Thread(target=self._sample, daemon=True).start()

    def enter(self, name: str | None) -> None:
        """End the running phase and begin the next. A name that was used before is added to: seconds sum, peaks max."""
        now, cpu = time.perf_counter(), time.process_time()
        if self._name is not None:
            held = self.phases.setdefault(self._name, {"wall": 0.0, "cpu": 0.0, "resident": 0, "anonymous": 0})
            held["wall"] += now - self._start
            held["cpu"] += cpu - self._cpu
            held["resident"] = max(held["resident"], status_bytes("VmHWM") - self.floor["resident"])
            held["anonymous"] = max(held["anonymous"], self._anonymous - self.floor["anonymous"])
        reset_peak()
        self._name, self._anonymous = name, status_bytes("RssAnon")
        self._start, self._cpu = time.perf_counter(), time.process_time()

    def take(self) -> dict[str, dict[str, float]]:
        """The phases since the last call."""
        taken, self.phases = self.phases, {}
        return taken

    def _sample(self) -> None:
        while True:
            now = status_bytes("RssAnon")  # first: a phase may begin while it is read, with a peak of its own
            self._anonymous = max(self._anonymous, now)
            time.sleep(0.002)


def write_result(path: Path, result: dict[str, Any]) -> None:
    """A worker's result, read by `harness.run_worker`."""
    path.write_text(json.dumps(result))
