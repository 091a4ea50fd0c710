"""One process of the scaling benchmark: PPO iterations under a process engine, phase by phase.

Started by scaling.py through torchrun: `--config FILE.yaml --out FOLDER --iterations N`; each process writes
FOLDER/RANK.json. The set-up and the stages are those of `quartet train`, without its checkpoints, evaluations and export.
"""

from __future__ import annotations

import argparse
import logging
import os
import time
from pathlib import Path
from typing import Any

import torch
from probe import Probe, warm_up, write_result

from quartet.config import load_config
from quartet.distributed import ProcessEngine, joined
from quartet.run.progress import display_of
from quartet.run.session import Session
from quartet.stages.advantages import compute_advantages
from quartet.stages.update import Updater


def iteration(session: Session, updater: Updater, probe: Probe) -> dict[str, Any]:
    """The four stages of one iteration, each a phase; ends when all processes are done."""
    engine, start = session.loaded.engine, time.perf_counter()
    prompts = session.next_prompts()
    probe.enter("rollout")
    rollout = session.generate(prompts)
    probe.enter("scoring")
    scored = session.score(rollout)
    batch = compute_advantages(scored, session.config.ppo, kl_coef=session.state.kl_coef)
    probe.enter("update")
    updater.update(batch, iteration=session.state.iteration + 1)
    engine.any(False)
    probe.enter("between")
    return {
        "seconds": time.perf_counter() - start,
        "phases": probe.take(),
        "response_tokens": int(batch.scored.rollout.response_mask.sum()),
        "load_average": os.getloadavg()[0],
    }


def run(options: argparse.Namespace, engine: ProcessEngine) -> dict[str, Any]:
    """Train; the phases of every iteration, and what was predicted."""
    config = load_config(options.config, [])
    warm_up()
    engine.any(False)
    probe = Probe(sample=True)
    with display_of(engine) as progress:
        probe.enter("load")
        session = Session.start(config, progress, engine, force=True)
        probe.enter("between")
        # Without the first steps of the rollout engine, which take the policy's weights together.
        loading = session.memory.as_dict()["phases"]["load"]["measured"]
        start, loaded = probe.take(), session.loaded
        updater = Updater(loaded.trained, loaded.optimizer, engine, config.ppo, temperature=1.0, seed=config.run.seed)
        iterations = []
        for done in range(options.iterations):
            iterations.append(iteration(session, updater, probe))
            episodes = (done + 1) * config.rollout.batch_size
            session.state = type(session.state)(done + 1, episodes, session.state.kl_coef)
    return {
        "rank": engine.rank,
        "floor": probe.floor,
        "load": {**start["load"], "anonymous": loading},
        "iterations": iterations,
        "predicted": session.memory.as_dict(),
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    """Join the others, train, write this process's figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--iterations", type=int, required=True)
    options = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with joined(load_config(options.config, [])) as engine:
        result = run(options, engine)
        write_result(options.out / f"{engine.rank}.json", result)


if __name__ == "__main__":
    main()
