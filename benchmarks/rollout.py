"""Rollouts by themselves: a decoding step beside its floor and what its time goes to, and what merging the adapter is worth.

32 rows to the limit of 64 tokens, in one process for each case. With LoRA the engine that keeps the adapter apart and the one
that adds it to copies of the weights take turns, after an update, so that the adapter is not zero.

step     milliseconds of one decoding step: what 63 further tokens add to a rollout of one, over 63
floor    what its arithmetic, or one pass over weights and cache at the rate of copying, takes at the least (`floor.py`)
gap      mean difference of the log-probabilities to those that training computes, in nats
profile  torch's, of one rollout, prompts included; `kernels` are compiled ones, timed in a rollout of their own, and `rest` is
         Python and what only looks at memory in another way

usage: python benchmarks/rollout.py [--quick] [--json FILE] [--only TEXT ...]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from harness import chosen_cases, heading, machine, make_models, own_versions, parser, run_worker, write_json

CASES = {
    f"{size} {'full' if plan == 'separate' else 'LoRA'}, {dtype}": (size, plan, dtype)
    for size in ("S", "M")
    for plan in ("separate", "paired")
    for dtype in ("float32", "bfloat16")
}
APART, MERGED = "apart", "merged"


def work(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of rollouts of all tokens and of one, in turn, of each engine; their gaps and profiles."""
    import torch
    from quartet_worker import configuration, profiled

    from quartet.distributed import SingleProcess
    from quartet.rollout.engine import SamplingSettings
    from quartet.rollout.static import StaticEngine
    from quartet.run.progress import Progress
    from quartet.run.session import Session
    from quartet.stages.advantages import compute_advantages
    from quartet.stages.correction import corrected
    from quartet.stages.update import Updater

    with tempfile.TemporaryDirectory() as folder, Progress() as progress:
        config = configuration(options, Path(folder))
        session = Session.start(config, progress, SingleProcess())
        loaded, prompts = session.loaded, session.next_prompts()
        batch = compute_advantages(session.score(session.generate(prompts)), config.ppo, kl_coef=0.05)
        Updater(loaded.trained, loaded.optimizer, loaded.engine, config.ppo, temperature=1.0, seed=7).update(
            batch, iteration=1
        )
        rows, length, policy = len(prompts), config.rollout.response_length, loaded.roles.policy
        loaded.roles.use("policy")
        names = (APART, MERGED) if options.plan == "paired" else (APART,)
        engines = {
            (name, tokens): StaticEngine(
                policy, SamplingSettings(tokens, 1.0, 1.0, None, 0, rows, seed=7), merged=name == MERGED
            )
            for name in names
            for tokens in (1, length)
        }
        seconds: dict[str, dict[int, list[float]]] = {name: {tokens: [] for _, tokens in engines} for name in names}
        for turn in range(options.turns + 1):
            for (name, tokens), engine in engines.items():
                start = time.perf_counter()
                engine.generate(prompts)
                if turn:  # the first warms up
                    seconds[name][tokens].append(time.perf_counter() - start)
        count = sum(map(len, prompts.tokens))
        found: dict[str, Any] = {"prompt_tokens": count, "rows": rows, "response_length": length}
        for name in names:
            engine = engines[name, length]
            with torch.no_grad():
                rollout = engine.generate(prompts)
                _, gap = corrected(rollout, loaded.roles, temperature=1.0, rows=config.ppo.microbatch_rows)
            total, tokens = gap.tolist()
            one, whole = (median(of) for of in seconds[name].values())
            found[name] = {
                "seconds": seconds[name],
                "whole": whole,
                "step": (whole - one) / (length - 1),
                "gap": total / tokens,
            }
            found[name] |= profiled(True, lambda engine=engine: engine.generate(prompts))
        return found


def shares_of(profile: dict[str, Any]) -> dict[str, float]:
    """Share of each kind of operations in the seconds of a profiled rollout. Calls of compiled kernels, of which torch's
    profiler sees nothing, have the share that they have without it."""
    from profile_update import shares

    found, plain = shares(profile), profile["plain"]
    compiled = sum(plain["kernels"].values()) / plain["seconds"]
    return found | {"kernels": compiled, "rest": found["kernels"] + found["rest"] - compiled}


def worker() -> None:
    """One case; its options are those of `quartet_worker.py`."""
    from probe import write_result
    from quartet_worker import parse

    turns = int(sys.argv.pop())
    options = parse()
    options.turns = turns
    write_result(options.out, work(options))


def step_floor(
    options: argparse.Namespace, size: str, dtype: str, found: dict[str, Any], rates: dict[str, float]
) -> float:
    """Seconds of one decoding step of all rows at the least, in the middle of a response."""
    from floor import BYTES, Shape, Work, flops

    rows, prompt, length = found["rows"], found["prompt_tokens"], found["response_length"]
    shape = Shape.of(options.models / size / "policy")
    one, whole = (flops(shape, Work(rows, prompt, rows * n, n - 1, 1), lora=False)["rollout"] for n in (1, length))
    cached = shape.layers * 2 * shape.hidden * shape.keys * (prompt + rows * length / 2)
    traffic = BYTES[dtype] * (shape.backbone + shape.head + cached)
    return max((whole - one) / (length - 1) / rates[dtype], traffic / rates["copy"])


def main() -> None:
    """Run the cases; print the table."""
    from profile_update import KINDS

    options = parser(__doc__).parse_args()
    chosen = chosen_cases(options, CASES)
    make_models(options, sorted({size for size, *_ in chosen.values()}), early=False)
    versions = {"quartet": own_versions()}
    print(heading(versions, options.threads))
    rates = run_worker(sys.executable, "floor.py", [], options.threads)
    print(f"\n| rollout | adapter | seconds | step, ms | floor, ms | share | gap | {' | '.join([*KINDS, 'rest'])} |")
    print("|" + "---|" * (7 + len(KINDS) + 1))
    results = {}
    for name, (size, plan, dtype) in chosen.items():
        arguments = ["--root", str(options.models / size), "--plan", plan, "--dtype", dtype, "--epochs", "1"]
        turns = 3 if options.quick or size == "M" else 7
        found = run_worker(sys.executable, "rollout.py", [*arguments, str(turns)], options.threads)
        floor = step_floor(options, size, dtype, found, rates)
        for adapter in (APART, MERGED):
            if adapter not in found:
                continue
            one = found[adapter]
            one |= {"floor": floor, "shares": shares_of(one["profile"])}
            parts = " | ".join(f"{share:.0%}" for share in one["shares"].values())
            print(
                f"| {name} | {adapter if plan == 'paired' else ''} | {one['whole']:.2f} | {1000 * one['step']:.1f} | "
                f"{1000 * floor:.1f} | {floor / one['step']:.0%} | {one['gap']:.4f} | {parts} |",
                flush=True,
            )
        results[name] = found
    about = {"machine": machine(), "versions": versions, "threads": options.threads, "seed": 7, "rates": rates}
    write_json(options.json, {**about, "cases": results})


if __name__ == "__main__":
    worker() if "--out" in sys.argv else main()
