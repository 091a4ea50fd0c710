"""Warnings: each at its threshold and not before, in one sentence with a remedy, and not again every iteration."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from quartet.config.load import known_keys
from quartet.run.advice import RULES, Adviser

GOOD = {
    "rollout/logprob_gap": 0.01,
    "kl/reference": 9.0,
    "response/length": 20.0,
    "policy/entropy": 2.0,
    "policy/clip_fraction": 0.1,
    "value/explained_variance": 0.4,
    "response/stopped_fraction": 0.5,
    "reward/score_std": 1.0,
    "reward/score": 0.25,
    "gradient/skipped_steps": 0,
}
EDGES = [
    ("kl/reference", 20.0, 20.1, "KL to the reference is 20.1 nats a response of 20 tokens"),
    ("policy/entropy", 0.1, 0.099, "entropy is 0.099 nats"),
    ("policy/clip_fraction", 0.3, 0.31, "31% of the tokens are clipped"),
    ("response/stopped_fraction", 0.01, 0.0, "no response stopped by itself"),
    ("reward/score_std", 1e-5, 0.0, "all episodes have the same score, 0.25"),
    ("rollout/logprob_gap", 0.05, 0.06, "disagree by 0.060 nats a token"),
    ("gradient/skipped_steps", 0, 2, "2 optimizer steps were not taken"),
]


def said(adviser: Adviser, **changes: Any) -> list[str]:
    return list(adviser.advice({**GOOD, **changes}))


@pytest.mark.parametrize(("metric", "fine", "wrong", "sentence"), EDGES, ids=[edge[0] for edge in EDGES])
def test_each_threshold(metric: str, fine: float, wrong: float, sentence: str) -> None:
    adviser = Adviser(stops=True)
    assert said(adviser, **{metric: fine}) == []
    assert said(adviser, **{metric: math.nan}) == []
    (found,) = said(adviser, **{metric: wrong})
    assert sentence in found
    assert "\n" not in found
    assert metric in found


def test_explained_variance_waits_for_five_in_a_row() -> None:
    adviser, wrong = Adviser(stops=True), {"value/explained_variance": -0.01}
    for _ in range(4):
        assert said(adviser, **wrong) == []
    assert said(adviser) == []
    for _ in range(4):
        assert said(adviser, **wrong) == []
    (found,) = said(adviser, **wrong)
    assert "value/explained_variance -0.01, under 0, for 5 iterations" in found


def test_what_lasts_is_repeated_ever_more_rarely() -> None:
    adviser = Adviser(stops=True)
    spoken = [n for n in range(100) if said(adviser, **{"policy/entropy": 0.0})]
    assert spoken == [0, 10, 20, 40, 80]
    said(adviser)
    assert said(adviser, **{"policy/entropy": 0.0})


def test_unstopped_responses_that_are_meant_are_no_warning() -> None:
    assert said(Adviser(stops=False), **{"response/stopped_fraction": 0.0}) == []


def test_every_remedy_names_a_key_that_exists_and_the_table_has_every_rule() -> None:
    keys = set(known_keys())
    table = (Path(__file__).parents[2] / "docs" / "warnings.md").read_text("utf-8").splitlines()
    rows = [line for line in table if line.startswith("| ") and not line.startswith("| warning")]
    assert len(rows) == len(RULES) == len(EDGES) + 1
    for text in [rule.remedy for rule in RULES] + rows:
        named = {word.strip("`,;.:|()= ").partition("=")[0] for word in text.replace("`", " ").split()}
        assert {word for word in named if word.startswith(("ppo.", "models.", "rollout."))} <= keys
    for metric, *_ in EDGES:
        assert any(f"`{metric}`" in row for row in rows), metric


def test_a_run_says_them(tiny_run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    from quartet.trainer import train

    train(tiny_run(**{"ppo.iterations": 2, "ppo.learning_rate": 0.5, "rollout.stop": "<stop>"}))
    assert "of the tokens are clipped (policy/clip_fraction, over 30%)" in capsys.readouterr().out
