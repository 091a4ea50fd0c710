"""The judge: VADER's compound score."""

from __future__ import annotations

import sys

import pytest

from quartet.demo.judge import vader_mean, vader_scores
from quartet.errors import DataError


def test_without_the_package_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(DataError, match=r"pip install quartet-rlhf\[demo\]"):
        vader_scores(["good"])


def test_compound_scores_are_those_of_the_published_examples() -> None:
    pytest.importorskip("vaderSentiment")
    # The first two examples of the package's own README.
    texts = ["VADER is smart, handsome, and funny.", "VADER is smart, handsome, and funny!"]
    assert vader_scores(texts) == [0.8316, 0.8439]
    assert vader_mean(texts) == pytest.approx(0.83775)


def test_no_text_is_refused() -> None:
    with pytest.raises(DataError, match="no text"):
        vader_mean([])
