"""The main job: fetch, train a reward model, run PPO against it, and say what came of it."""

from __future__ import annotations

import json
import math
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from quartet.config import Config, load_config
from quartet.demo.cached import using
from quartet.demo.judge import vader_mean, vader_scores
from quartet.demo.packages import DemoFiles, fetch
from quartet.demo.prompts import evaluation_prompts, openings, write_prompts
from quartet.demo.ratings import RatingSplit, load_ratings, split_ratings
from quartet.demo.reward_model import RewardModelReport, ensure_reward_model
from quartet.errors import ConfigError, brief, cause_of
from quartet.models.cache import cache_folder
from quartet.run.folder import RunFolder
from quartet.run.metrics import FILE_NAME, read_metrics
from quartet.run.progress import Progress
from quartet.run.samples import read_samples
from quartet.trainer import train

CONFIG = Path(__file__).with_name("demo.yaml")
SPLIT_SEED = 0
"""The sentences' split does not move with `--seed`, so that the evaluation prompts are the same in every run."""
SHOWN = 5


@dataclass(frozen=True, slots=True)
class DemoResult:
    """The figures of one demo run; scores are the reward model's, judge scores VADER's compound in -1..1."""

    reward_pair_accuracy: float
    score_before: float
    score_after: float
    score_sd_before: float
    judge_before: float
    judge_after: float
    kl_before: float
    """Zero but for rounding and chance."""
    kl: float
    """Mean over responses of the log-probability under the policy minus that under the reference, nats."""
    seconds_reward: float
    seconds_ppo: float
    peak_bytes: int
    """Largest resident memory of the process during PPO."""


def run_demo(*, iterations: int | None, seed: int, out: Path | None, console: Console | None = None) -> DemoResult:
    """Run the whole demo; every figure it prints is also in `demo.json` of the run folder.

    Args:
        iterations: of PPO; None takes demo.yaml's.
        seed: of reward model and PPO.
        out: run folder; None takes the first free `runs/demo`, `runs/demo-2`, ...

    Raises:
        QuartetError: a download failed, a sum differs, or the folder is in use.
    """
    console = console or Console()
    if not 0 <= seed < 2**63:
        raise ConfigError(f"--seed={seed} is out of range; give 0 or more, and less than 2**63")
    vader_scores(["the judge is there"])  # before the minutes that precede its first use
    folder = out or _free_folder(Path("runs/demo"))
    _refuse_unusable(RunFolder(folder))

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    with using(cache_folder()):
        say("1. Model and human ratings")
        files = fetch(cache_folder(), say)
        split = split_ratings(load_ratings(files.ratings), seed=SPLIT_SEED)
        say("2. Reward model")
        reward_folder, report = ensure_reward_model(files.model, split, cache_folder(), seed=seed, say=say)
        say("3. PPO")
        config = _configuration(files, reward_folder, split, iterations=iterations, seed=seed, folder=folder)
    start = time.perf_counter()
    train(config, progress=Progress(console))
    result = _measure(folder, report, time.perf_counter() - start)
    figures = {name: getattr(result, name) for name in DemoResult.__slots__}
    (folder / "demo.json").write_text(json.dumps(figures, indent=2) + "\n", "utf-8")
    _show(console, folder, result)
    return result


def _configuration(
    files: DemoFiles, reward: Path, split: RatingSplit, *, iterations: int | None, seed: int, folder: Path
) -> Config:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(files.model)
    evaluation = evaluation_prompts([sentence.text for sentence in split.evaluation], tokenizer)
    training = openings([sentence.text for sentence in split.ppo], tokenizer, avoid=set(evaluation))
    data = cache_folder() / "prompts"
    write_prompts(data / "train.jsonl", training)
    write_prompts(data / "evaluation.jsonl", evaluation)
    overrides = {
        "models.sft": files.model,
        "models.reward": reward,
        "data.prompts": data / "train.jsonl",
        "data.eval_prompts": data / "evaluation.jsonl",
        "run.dir": folder,
        "run.seed": seed,
    }
    if iterations is not None:
        overrides["ppo.iterations"] = iterations
    return load_config(CONFIG, [f"{key}={_quoted(value)}" for key, value in overrides.items()])


def _quoted(value: object) -> str:
    return json.dumps(str(value)) if isinstance(value, Path) else str(value)


def _measure(folder: Path, report: RewardModelReport, seconds: float) -> DemoResult:
    samples = read_samples(RunFolder(folder).samples)
    last = max(sample["iteration"] for sample in samples)
    before = [sample for sample in samples if sample["iteration"] == 0]
    after = [sample for sample in samples if sample["iteration"] == last]
    scores = [sample["score"] for sample in before]
    metrics = read_metrics(folder / FILE_NAME)
    return DemoResult(
        reward_pair_accuracy=report.pair_accuracy,
        score_before=_mean(scores),
        score_after=_mean([sample["score"] for sample in after]),
        score_sd_before=math.sqrt(_mean([(score - _mean(scores)) ** 2 for score in scores])),
        judge_before=vader_mean([_text(sample) for sample in before]),
        judge_after=vader_mean([_text(sample) for sample in after]),
        kl_before=_mean([sample["kl"] for sample in before]),
        kl=_mean([sample["kl"] for sample in after]),
        seconds_reward=report.seconds,
        seconds_ppo=seconds,
        peak_bytes=int(max(record["memory/peak_bytes"] for record in metrics)),
    )


def _show(console: Console, folder: Path, result: DemoResult) -> None:
    samples = read_samples(RunFolder(folder).samples)
    last = max(sample["iteration"] for sample in samples)
    before = {s["prompt"]: s["response"] for s in samples if s["iteration"] == 0}
    after = {s["prompt"]: s["response"] for s in samples if s["iteration"] == last}
    figures = Table(title=f"{len(before)} held-out prompts", title_justify="left")
    for heading in ("", "before", "after"):
        figures.add_column(heading, justify="left" if not heading else "right")
    figures.add_row("reward model's score", f"{result.score_before:.2f}", f"{result.score_after:.2f}")
    figures.add_row("  its standard deviation", f"{result.score_sd_before:.2f}", "")
    figures.add_row("VADER, never seen in training", f"{result.judge_before:.2f}", f"{result.judge_after:.2f}")
    figures.add_row("KL to the reference, nats a response", f"{result.kl_before:.2f}", f"{result.kl:.2f}")
    texts = Table(title="The same prompts, before and after", title_justify="left", show_lines=True)
    for heading in ("prompt", "before", "after"):
        texts.add_column(heading, ratio=1 if heading == "prompt" else 2)
    for prompt in list(before)[:SHOWN]:
        texts.add_row(*(_plain(text) for text in (prompt, before[prompt], after[prompt])))
    console.print(figures, texts, sep="\n")
    lines = [
        f"Reward model: {result.reward_pair_accuracy:.3f} of held-out pairs in the order people gave them, "
        f"trained in {result.seconds_reward:.0f} s.",
        f"PPO: {result.seconds_ppo:.0f} s, peak memory {result.peak_bytes / 2**30:.2f} GiB.",
        f"Policy (a PEFT adapter): {folder / 'policy'}    critic: {folder / 'value'}    figures: {folder / 'demo.json'}",
        f"Metrics: {folder / FILE_NAME}    samples: {folder / 'samples.jsonl'}    configuration: {folder / 'config.yaml'}",
        "Try next: quartet demo --seed 1; or copy config.yaml, point models.sft, models.reward and data.prompts to your "
        "own, and: quartet train config.yaml ppo.kl_coef=0.1 run.dir=runs/mine",
    ]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _text(sample: dict[str, Any]) -> str:
    """The continuation alone: the judge is not to see the prompt, which did not change."""
    response: str = sample["response"]
    return response


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(" ".join(text.split()))


def _mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers)


def _refuse_unusable(run: RunFolder) -> None:
    """Find out before the reward model is trained; nothing that is made for it stays."""
    folder = run.path
    made: list[Path] = []
    try:
        run.refuse_used()
        made += [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"the run folder {brief(folder)} cannot be written ({cause_of(error)}); name another one with --out"
        ) from error
    finally:
        for path in made:
            with suppress(OSError):
                path.rmdir()


def _free_folder(base: Path) -> Path:
    for number in range(1, 10_000):
        folder = base if number == 1 else base.with_name(f"{base.name}-{number}")
        if not folder.exists():
            return folder
    raise ConfigError(f"{base} and its 10,000 successors exist; name a folder with --out")
