"""An independent judge: VADER's lexicon (Hutto and Gilbert, ICWSM 2014), which no reward model was trained on."""

from __future__ import annotations

from collections.abc import Sequence

from quartet.errors import DataError


def vader_scores(texts: Sequence[str]) -> list[float]:
    """Compound sentiment of each text, -1 (most negative) to 1 (most positive).

    Raises:
        DataError: the package `vaderSentiment` is not installed.
    """
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise DataError(
            "the demo's judge needs the package vaderSentiment, which is not installed; "
            "run `pip install quartet-rlhf[demo]`"
        ) from error
    analyzer = SentimentIntensityAnalyzer()
    return [float(analyzer.polarity_scores(text)["compound"]) for text in texts]


def vader_mean(texts: Sequence[str]) -> float:
    """Mean of `vader_scores`.

    Raises:
        DataError: no text, or the package `vaderSentiment` is not installed.
    """
    if not texts:
        raise DataError("the judge was given no text; give at least one")
    scores = vader_scores(texts)
    return sum(scores) / len(scores)
