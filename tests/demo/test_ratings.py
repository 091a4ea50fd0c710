"""Reading, cleaning and splitting the rated sentences, on a small made-up archive."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from quartet.demo.ratings import RatedSentence, clean, load_ratings, parse_ratings, split_ratings
from quartet.errors import DataError

LINES = "1\t2.5\tA fine film.\n2\t-0.6\tEffective but too tepid\n3\t1.0\tAndré Turpin.\n4\t-4\tA fine film.\n"


def _tar(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def _sdist(folder: Path, ratings: bytes, *, name: str = "movieReviewSnippets_GroundTruth.txt") -> Path:
    inner = _tar({"hutto_ICWSM_2014/tweets_GroundTruth.txt": b"", f"hutto_ICWSM_2014/{name}": ratings})
    path = folder / "package.tar.gz"
    path.write_bytes(_tar({"package-1/additional_resources/hutto_ICWSM_2014.tar.gz": inner}))
    return path


def test_sentences_and_ratings_come_out_of_the_nested_archive_without_repetitions(tmp_path: Path) -> None:
    assert load_ratings(_sdist(tmp_path, LINES.encode())) == (
        RatedSentence("A fine film.", 2.5),
        RatedSentence("Effective but too tepid", -0.6),
        RatedSentence("André Turpin.", 1.0),
    )


def test_an_archive_without_the_ratings_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no movieReviewSnippets_GroundTruth\.txt"):
        load_ratings(_sdist(tmp_path, b"", name="other.txt"))


def test_a_broken_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "broken.tar.gz"
    path.write_bytes(b"not an archive")
    with pytest.raises(DataError, match=r"broken\.tar\.gz cannot be read"):
        load_ratings(path)


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("a new ''Conan'' and", 'a new "Conan" and'),
        ("all comics    even those", "all comics – even those"),
        ("two  blanks ", "two blanks"),
        ("Lovely &amp; Amazing", "Lovely & Amazing"),
        ("'Stock up on silver bullets.'", "Stock up on silver bullets."),
        ("''Quoted'' it's", '"Quoted" it\'s'),
    ],
)
def test_artefacts_of_the_data_set_are_undone(raw: str, cleaned: str) -> None:
    assert clean(raw) == cleaned


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("1\t2.0\tgood\n2 1.0 bad\n", "line 2, has 1 columns"),
        ("1\tgreat\tgood\n", "line 1, has the rating 'great'"),
        ("1\t4.5\tgood\n", "line 1, has the rating '4.5'"),
        ("1\tnan\tgood\n", "line 1, has the rating 'nan'"),
        ("", "holds no rated sentence"),
    ],
)
def test_lines_that_are_no_ratings_are_refused_with_their_place(content: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_ratings(content, origin="file.txt")


def _sentences(count: int) -> list[RatedSentence]:
    return [RatedSentence(f"sentence {index}", 0.0) for index in range(count)]


def test_the_split_is_disjoint_complete_and_of_the_asked_sizes() -> None:
    split = split_ratings(_sentences(50), seed=0, held_out=5, evaluation=7, ppo=11)
    sets = [split.reward_held_out, split.evaluation, split.ppo, split.reward_train]
    assert [len(part) for part in sets] == [5, 7, 11, 27]
    assert len({sentence.text for part in sets for sentence in part}) == 50


def test_the_split_depends_on_the_seed_and_not_on_the_order() -> None:
    sizes = {"held_out": 5, "evaluation": 7, "ppo": 11}
    split = split_ratings(_sentences(50), seed=3, **sizes)
    assert split_ratings(reversed(_sentences(50)), seed=3, **sizes) == split
    assert split_ratings(_sentences(50), seed=4, **sizes) != split


def test_too_few_sentences_are_refused() -> None:
    with pytest.raises(DataError, match="10 rated sentences are too few for a split that holds 10 out"):
        split_ratings(_sentences(10), seed=0, held_out=5, evaluation=2, ppo=3)
