"""The demo's reward model: a LoRA adapter and a scalar head, fitted to human ratings by pairwise comparison."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quartet.demo.cached import put
from quartet.demo.conversion import weights_digest
from quartet.demo.ratings import RatedSentence, RatingSplit, ratings_digest
from quartet.demo.reward_loss import correlation, pair_accuracy, pairwise_loss
from quartet.demo.reward_scorer import Scorer, new_scorer
from quartet.errors import CheckpointError

Say = Callable[[str], None]
REPORT_FILE = "report.json"
EVALUATION_ROWS = 32


@dataclass(frozen=True, slots=True)
class RewardRecipe:
    """How the reward model is trained."""

    steps: int = 40
    """Optimizer steps; every one takes fresh sentences."""
    batch_rows: int = 32
    """Sentences in a step; all their pairs count."""
    max_tokens: int = 32
    """Longer sentences are not trained on: a step costs what its tokens cost, and the demo's sequences are short."""
    learning_rate: float = 1e-3
    """At the start; it falls linearly to zero."""
    max_grad_norm: float = 1.0
    """Gradients are scaled to at most this norm."""
    min_gap: float = 1.0
    """Pairs whose ratings differ by less are not compared."""
    cut_weight: float = 0.25
    """Weight of the same loss on the sentences cut off in their second half: PPO's responses end in mid-sentence."""
    lora_rank: int = 16
    """Rank of the adapter."""
    lora_alpha: int = 32
    """Scale of the adapter: its output is multiplied by alpha / rank."""
    head_std: float = 0.01
    """Standard deviation that the score head is drawn with."""


@dataclass(frozen=True, slots=True)
class RewardModelReport:
    """How well the reward model orders sentences that it was not trained on, and what that cost."""

    pair_accuracy: float
    """Share of the held-out pairs, a rating apart or more, that it orders as people did."""
    correlation: float
    """Pearson correlation of its scores with the ratings."""
    score_mean: float
    """Mean score of the held-out sentences; the head has no bias that could make it zero."""
    score_sd: float
    """Standard deviation of the same scores."""
    held_out: int
    """Held-out sentences."""
    sentences: int
    """Sentences trained on."""
    seconds: float
    """Loading, training and evaluation, wall time."""


def ensure_reward_model(
    model_dir: Path,
    ratings: RatingSplit,
    cache: Path,
    *,
    seed: int,
    say: Say,
    recipe: RewardRecipe | None = None,
) -> tuple[Path, RewardModelReport]:
    """The cached reward model of this recipe, seed, data and base model, trained now if there is none.

    Returns:
        Its folder, and the report of its training.

    Raises:
        CheckpointError: as `train_reward_model`, or the cached report is unreadable.
    """
    recipe = recipe or RewardRecipe()
    folder = cache / f"reward-model-{_cache_key(model_dir, ratings, seed, recipe)}"
    if not folder.is_dir():
        return folder, train_reward_model(model_dir, ratings, folder, seed=seed, say=say, recipe=recipe)
    try:
        report = RewardModelReport(**json.loads((folder / REPORT_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"the cached reward model {folder} is incomplete; delete the folder and run again"
        ) from error
    say(f"reward model: cached, held-out pair accuracy {report.pair_accuracy:.3f}")
    return folder, report


def train_reward_model(
    model_dir: Path,
    ratings: RatingSplit,
    out_dir: Path,
    *,
    seed: int,
    say: Say,
    recipe: RewardRecipe | None = None,
) -> RewardModelReport:
    """Fit a LoRA adapter and a score head on `ratings.reward_train`, measure them on `ratings.reward_held_out`.

    `out_dir` becomes a PEFT adapter folder (task type SEQ_CLS; adapter and head in float32) with tokenizer files and
    the report. It appears complete or not at all.

    Args:
        model_dir: checkpoint folder of a causal language model with a tokenizer.
        ratings: the split sentences.
        out_dir: must not exist yet.
        seed: of adapter, head, data order and cuts.
        say: receives one line of progress at a time.
        recipe: how to train; None takes the default.

    Raises:
        CheckpointError: the model has no pad token, or `out_dir` exists.
    """
    from transformers import AutoTokenizer

    recipe = recipe or RewardRecipe()
    if out_dir.exists():
        raise CheckpointError(f"{out_dir} exists already; delete it to train the reward model again")
    started = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    # The caller's random state stays as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        scorer = new_scorer(
            model_dir, lora_rank=recipe.lora_rank, lora_alpha=recipe.lora_alpha, head_std=recipe.head_std
        )
    examples = _tokenized(tokenizer, ratings.reward_train)
    trained_on = _train(scorer, examples, recipe, random.Random(seed), say)
    scores, targets = _scores(scorer, _tokenized(tokenizer, ratings.reward_held_out))
    report = RewardModelReport(
        pair_accuracy=pair_accuracy(scores, targets, min_gap=recipe.min_gap),
        correlation=correlation(scores, targets),
        score_mean=float(scores.mean()),
        score_sd=float(scores.std()),
        held_out=len(scores),
        sentences=trained_on,
        seconds=round(time.perf_counter() - started, 1),
    )
    _write(scorer, tokenizer, report, out_dir)
    say(f"reward model: held-out pair accuracy {report.pair_accuracy:.3f}, {report.seconds:.0f} s")
    return report


@dataclass(frozen=True, slots=True)
class _Example:
    """A tokenized sentence."""

    tokens: tuple[int, ...]
    rating: float


def _tokenized(tokenizer: Any, sentences: Sequence[RatedSentence]) -> list[_Example]:
    ids = tokenizer([sentence.text for sentence in sentences], add_special_tokens=False)["input_ids"]
    return [_Example(tuple(row), sentence.rating) for row, sentence in zip(ids, sentences, strict=True) if row]


def _batches(examples: Sequence[_Example], recipe: RewardRecipe, rng: random.Random) -> list[list[_Example]]:
    """Batches of sentences of like length (hardly any padding), in random order; every sentence at most once."""
    pool = [example for example in examples if len(example.tokens) <= recipe.max_tokens]
    chosen = rng.sample(pool, min(len(pool), recipe.steps * recipe.batch_rows))
    chosen.sort(key=lambda example: len(example.tokens))
    batches = [chosen[start : start + recipe.batch_rows] for start in range(0, len(chosen), recipe.batch_rows)]
    rng.shuffle(batches)
    return batches


def _train(scorer: Scorer, examples: Sequence[_Example], recipe: RewardRecipe, rng: random.Random, say: Say) -> int:
    """Train in place; returns how many sentences were used."""
    batches = _batches(examples, recipe, rng)
    parameters = scorer.trainable()
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=0.0, fused=True)
    scorer.adapted.train()
    started, recent = time.perf_counter(), 0.0
    for step, batch in enumerate(batches, start=1):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * (1 - (step - 1) / len(batches))
        ratings = torch.tensor([example.rating for example in batch])
        lengths = [len(example.tokens) for example in batch]
        hidden = scorer.hidden([example.tokens for example in batch])
        whole = pairwise_loss(scorer.scores(hidden, [n - 1 for n in lengths]), ratings, min_gap=recipe.min_gap)
        # The model is causal: the score of a cut sentence is read from the same pass, at an earlier token.
        cuts = [rng.randrange(n // 2, n) for n in lengths]
        cut = pairwise_loss(scorer.scores(hidden, cuts), ratings, min_gap=recipe.min_gap)
        (whole + recipe.cut_weight * cut).backward()
        nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        recent += whole.item()
        if step % 10 == 0 or step == len(batches):
            mean = recent / (step % 10 or 10)
            say(f"reward model: step {step} of {len(batches)}, loss {mean:.3f}, {time.perf_counter() - started:.0f} s")
            recent = 0.0
    return sum(len(batch) for batch in batches)


@torch.no_grad()
def _scores(scorer: Scorer, examples: Sequence[_Example]) -> tuple[Tensor, Tensor]:
    """Scores and ratings `[N]` of the examples, both ordered by length."""
    scorer.adapted.eval()
    ordered = sorted(examples, key=lambda example: len(example.tokens))
    scores = []
    for start in range(0, len(ordered), EVALUATION_ROWS):
        rows = [example.tokens for example in ordered[start : start + EVALUATION_ROWS]]
        scores.append(scorer.scores(scorer.hidden(rows), [len(row) - 1 for row in rows]))
    return torch.cat(scores), torch.tensor([example.rating for example in ordered])


def _write(scorer: Scorer, tokenizer: Any, report: RewardModelReport, out_dir: Path) -> None:
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out_dir.parent, prefix=".reward-model-") as temporary:
        folder = Path(temporary) / "adapter"
        # The base's embeddings are untouched; asking for them ("auto") would look the base up on the Hub.
        scorer.adapted.save_pretrained(folder, save_embedding_layers=False)
        tokenizer.save_pretrained(folder)
        (folder / REPORT_FILE).write_text(json.dumps(dataclasses.asdict(report), indent=2) + "\n", encoding="utf-8")
        put(folder, out_dir)


def _cache_key(model_dir: Path, ratings: RatingSplit, seed: int, recipe: RewardRecipe) -> str:
    """Twelve hexadecimal digits that change with anything the reward model depends on."""
    parts = {
        "recipe": dataclasses.asdict(recipe),
        "seed": seed,
        "train": ratings_digest(ratings.reward_train),
        "held_out": ratings_digest(ratings.reward_held_out),
        "weights": weights_digest(model_dir),
        # The adapter's folder names its base by path.
        "base": str(model_dir.resolve()),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]
