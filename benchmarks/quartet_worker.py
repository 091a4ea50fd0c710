"""PPO iterations of Quartet on the benchmarks' checkpoints, phase by phase.

Run by the benchmarks in a process of its own: `--root FOLDER/SIZE --out FILE.json`, workload options below. The set-up
and the stages are those of `quartet train`, without its checkpoints, evaluations and export.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from probe import LORA_ALPHA, LORA_LINEARS, LORA_RANK, Probe, settle, warm_up, write_result
from torch.profiler import ProfilerActivity, profile

from quartet.allocator import return_gaps
from quartet.config import Config, parse_config
from quartet.distributed import SingleProcess
from quartet.models.precision import resolve_device, resolve_dtype
from quartet.run.progress import Progress
from quartet.run.session import Session
from quartet.stages.advantages import compute_advantages
from quartet.stages.update import Updater


def parse() -> argparse.Namespace:
    """The workload; the names are those of the peer's script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--plan", choices=("separate", "paired", "single"), default="separate")
    parser.add_argument("--quantization", choices=("4bit", "8bit"))
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="float32")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--policy", default="policy")
    parser.add_argument("--stop", choices=("eos", "none"), default="none")
    parser.add_argument("--iterations", type=int, default=2)
    parser.add_argument("--episodes", type=int, default=32)
    parser.add_argument("--response-length", type=int, default=64)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--batch-rows", type=int, default=32, help="rollout.batch_rows")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--return-memory", action="store_true", help="run.return_memory: true")
    parser.add_argument("--parallel", choices=("auto", "true", "false"), default="auto", help="run.parallel_passes")
    parser.add_argument("--sample-memory", action="store_true")
    parser.add_argument("--profile", action="store_true", help="keep what the last update's time went to")
    return parser.parse_args()


def configuration(options: argparse.Namespace, folder: Path) -> Config:
    """The configuration file that a user would write for this workload."""
    lines = (options.root / "prompts.jsonl").read_text().splitlines(keepends=True)[: options.episodes]
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(lines))
    reward = "reward-lora" if options.plan == "single" else "reward"
    lora = {"r": LORA_RANK, "alpha": LORA_ALPHA, "target_modules": LORA_LINEARS}
    return parse_config(
        {
            "models": {
                "sft": str(options.root / options.policy),
                "reward": str(options.root / reward),
                "sharing": options.plan,
                "lora": None if options.plan == "separate" else lora,
                "quantization": options.quantization,
                "dtype": options.dtype,
                "device": options.device,
                "gradient_checkpointing": options.checkpointing,
            },
            "data": {"prompts": str(prompts), "column": "text", "eval_count": 0},
            "rollout": {
                "batch_size": options.episodes,
                "batch_rows": options.batch_rows,
                "response_length": options.response_length,
                "stop": "eos" if options.stop == "eos" else None,
            },
            "ppo": {
                "iterations": options.iterations,
                "epochs": options.epochs,
                "microbatch_rows": options.rows,
                "learning_rate": 3e-6,
            },
            "run": {
                "dir": str(folder / "run"),
                "seed": 7,
                "return_memory": options.return_memory or "auto",
                "parallel_passes": {"true": True, "false": False}.get(options.parallel, "auto"),
            },
        }
    )


def in_kernels(run: Callable[[], object]) -> dict[str, Any]:
    """Run; seconds of the block, and of all calls of each compiled kernel."""
    from quartet.kernels import library

    found: dict[str, float] = defaultdict(float)

    def timed(name: str) -> Callable[..., None] | None:
        function = library.kernel(name)

        def call(*given: Any) -> None:
            assert function is not None
            start = time.perf_counter()
            function(*given)
            found[name] += time.perf_counter() - start

        return None if function is None else call

    modules = [module for name, module in sys.modules.items() if name.startswith("quartet.kernels.")]
    users = [module for module in modules if module is not library and hasattr(module, "kernel")]
    for module in users:
        module.kernel = timed
    start = time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    for module in users:
        module.kernel = library.kernel
    return {"seconds": seconds, "kernels": dict(found)}


def profiled(wanted: bool, run: Callable[[], object]) -> dict[str, Any]:
    """Run; twice where that is wanted, for the seconds of compiled kernels and those of each operation by itself."""
    if not wanted:
        run()
        return {}
    plain = in_kernels(run)
    start = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        run()
        seconds = time.perf_counter() - start
    operations = {entry.key: entry.self_cpu_time_total / 1e6 for entry in found.key_averages()}
    return {"profile": {"seconds": seconds, "operations": operations, "plain": plain}}


def iteration(session: Session, updater: Updater, probe: Probe, *, profile_update: bool) -> dict[str, Any]:
    """The four stages of one iteration, each a phase."""
    config, loaded = session.config, session.loaded
    prompts = session.next_prompts()
    probe.enter("rollout")
    rollout = session.generate(prompts)
    settle(config.models.device)
    probe.enter("scoring")
    scored = session.score(rollout)
    batch = compute_advantages(scored, config.ppo, kl_coef=session.state.kl_coef)
    settle(config.models.device)
    probe.enter("update")
    loaded.roles.use("policy", "value")
    number = session.state.iteration + 1
    profile_of = profiled(profile_update, lambda: updater.update(batch, iteration=number))
    settle(config.models.device)
    return_gaps()  # as `Session.timed` does
    probe.enter("between")
    return {
        "phases": probe.take(),
        "prompt_tokens": sum(len(tokens) for tokens in prompts.tokens),
        "response_tokens": int(rollout.response_mask.sum()),
        "decode_steps": rollout.decode_steps,
        "score": float(scored.scores.mean()),
        "load_average": os.getloadavg()[0],
        **profile_of,
    }


def main() -> None:
    """Train; write the phases of every iteration."""
    options = parse()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    if options.quantization is not None:
        import bitsandbytes  # noqa: F401 - libraries belong to the floor
    warm_up()
    gc.freeze()  # as the command does after its imports
    probe = Probe(sample=options.sample_memory)
    with tempfile.TemporaryDirectory() as folder, Progress() as progress:
        config = configuration(options, Path(folder))
        probe.enter("load")
        session = Session.start(config, progress, SingleProcess())
        probe.enter("between")
        start, loaded = probe.take(), session.loaded
        updater = Updater(
            loaded.trained,
            loaded.optimizer,
            loaded.engine,
            config.ppo,
            temperature=1.0,
            seed=config.run.seed,
            at_once=session.memory.parallel_passes,
        )
        iterations = []
        for done in range(options.iterations):
            last = done + 1 == options.iterations
            iterations.append(iteration(session, updater, probe, profile_update=options.profile and last))
            session.state = type(session.state)(done + 1, (done + 1) * options.episodes, session.state.kl_coef)
    result = {
        "floor": probe.floor,
        "load": start["load"],
        "iterations": iterations,
        "optimizer": f"{type(loaded.optimizer).__name__}(fused={loaded.optimizer.defaults.get('fused')})",
        "dtype": str(resolve_dtype(config.models.dtype, resolve_device(options.device))).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }
    write_result(options.out, result)


if __name__ == "__main__":
    main()
