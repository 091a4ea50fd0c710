"""Movie-review sentences with mean human ratings from -4 to 4 (Hutto and Gilbert, ICWSM 2014), and their split."""

from __future__ import annotations

import hashlib
import html
import io
import math
import re
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from quartet.errors import DataError

RATINGS_ARCHIVE = "hutto_ICWSM_2014.tar.gz"
RATINGS_FILE = "movieReviewSnippets_GroundTruth.txt"


@dataclass(frozen=True, slots=True)
class RatedSentence:
    """A sentence and the mean of its human ratings, -4 (most negative) to 4 (most positive)."""

    text: str
    rating: float


@dataclass(frozen=True, slots=True)
class RatingSplit:
    """Four disjoint sets of sentences."""

    reward_train: tuple[RatedSentence, ...]
    """What the reward model is fitted on."""
    reward_held_out: tuple[RatedSentence, ...]
    """What its pair accuracy is measured on."""
    evaluation: tuple[RatedSentence, ...]
    """Openings of these are the held-out evaluation prompts."""
    ppo: tuple[RatedSentence, ...]
    """Openings of these are the prompts PPO trains on."""


def load_ratings(sdist: Path) -> tuple[RatedSentence, ...]:
    """Read the rated movie-review sentences from vaderSentiment's source distribution.

    Args:
        sdist: the `.tar.gz`; the ratings are an archive inside it.

    Returns:
        The sentences in the order of the file, cleaned, without repetitions.

    Raises:
        DataError: the archive or the ratings in it are missing or unreadable.
    """
    try:
        with tarfile.open(sdist) as outer:
            inner_bytes = _member(outer, RATINGS_ARCHIVE, sdist)
        with tarfile.open(fileobj=io.BytesIO(inner_bytes)) as inner:
            content = _member(inner, RATINGS_FILE, sdist)
    except (OSError, EOFError, tarfile.TarError) as error:
        raise DataError(
            f"{sdist} cannot be read as a source distribution ({error}); delete it and run again"
        ) from error
    return parse_ratings(content.decode("utf-8"), origin=RATINGS_FILE)


def parse_ratings(content: str, *, origin: str) -> tuple[RatedSentence, ...]:
    """Parse lines of `id <tab> mean rating <tab> text`.

    Raises:
        DataError: a line without three columns or with a rating outside -4..4, or no line at all.
    """
    sentences: dict[str, RatedSentence] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        columns = line.split("\t", maxsplit=2)
        if len(columns) < 3:
            raise DataError(f"{origin}, line {number}, has {len(columns)} columns instead of id, rating and text")
        text = clean(columns[2])
        if text:
            sentences.setdefault(text, RatedSentence(text, _rating(columns[1], f"{origin}, line {number},")))
    if not sentences:
        raise DataError(f"{origin} holds no rated sentence; delete the cached archive and run again")
    return tuple(sentences.values())


def clean(text: str) -> str:
    """Undo what the data set's own preparation did to the text.

    Character references become characters, doubled apostrophes become quotation marks, a run of three or more blanks
    (a dash that was lost) becomes a dash, other blanks collapse, and apostrophes around the whole sentence go.
    """
    text = html.unescape(text).strip()
    if len(text) > 2 and text[0] == text[-1] == "'" and text[1] != "'":
        text = text[1:-1]
    text = text.replace("''", '"')
    text = re.sub(r"(?<=\S)\s{3,}(?=\S)", " – ", text)
    return re.sub(r"\s+", " ", text).strip()


def split_ratings(
    sentences: Iterable[RatedSentence],
    *,
    seed: int,
    held_out: int = 600,
    evaluation: int = 400,
    ppo: int = 4000,
) -> RatingSplit:
    """Split into disjoint sets; the rest is `reward_train`.

    Each sentence's place follows from a hash of the seed and its text alone, so the split does not depend on the order
    of the file or on a random generator.

    Raises:
        DataError: fewer sentences than the split needs.
    """
    ordered = sorted(sentences, key=lambda sentence: hashlib.sha256(f"{seed}:{sentence.text}".encode()).digest())
    taken = held_out + evaluation + ppo
    if len(ordered) <= taken:
        raise DataError(f"{len(ordered)} rated sentences are too few for a split that holds {taken} out; ask for fewer")
    return RatingSplit(
        reward_train=tuple(ordered[taken:]),
        reward_held_out=tuple(ordered[:held_out]),
        evaluation=tuple(ordered[held_out : held_out + evaluation]),
        ppo=tuple(ordered[held_out + evaluation : taken]),
    )


def ratings_digest(sentences: Sequence[RatedSentence]) -> str:
    """SHA-256 over texts and ratings in order, hexadecimal."""
    digest = hashlib.sha256()
    for sentence in sentences:
        digest.update(f"{sentence.rating!r}\t{sentence.text}\n".encode())
    return digest.hexdigest()


def _member(archive: tarfile.TarFile, name: str, origin: Path) -> bytes:
    for member in archive:
        if member.isfile() and Path(member.name).name == name:
            stream = archive.extractfile(member)
            if stream is not None:
                return stream.read()
    raise DataError(f"{origin} holds no {name}; delete it and run again")


def _rating(column: str, place: str) -> float:
    try:
        rating = float(column)
    except ValueError:
        rating = math.nan
    if not -4.0 <= rating <= 4.0:
        raise DataError(f"{place} has the rating {column!r}, which is not a number from -4 to 4")
    return rating
