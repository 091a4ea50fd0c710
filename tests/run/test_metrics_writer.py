"""metrics.jsonl is strict JSON, survives a crash and a resume, and goes to TensorBoard when asked."""

import errno
import json
import math
import sys
from pathlib import Path

import pytest

from quartet.errors import CheckpointError, ConfigError
from quartet.run.metrics import MetricsWriter, read_metrics


def lines(folder: Path) -> list[str]:
    return (folder / "metrics.jsonl").read_text().splitlines()


def iterations(folder: Path) -> list[float]:
    return [record["iteration"] for record in read_metrics(folder / "metrics.jsonl")]


def test_a_line_is_on_disk_as_soon_as_it_is_written(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "new" / "run", []) as writer:
        writer.write({"iteration": 1, "reward/score": 0.1})
        assert lines(tmp_path / "new" / "run") == ['{"iteration": 1, "reward/score": 0.1}']
        writer.write({"iteration": 2, "reward/score": -1e-30})
        assert lines(tmp_path / "new" / "run")[1] == '{"iteration": 2, "reward/score": -1e-30}'


def test_not_finite_becomes_null_and_is_read_as_nan(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, []) as writer:
        writer.write({"iteration": 1, "a": math.nan, "b": math.inf, "c": -math.inf, "d": 2.5})
    assert lines(tmp_path) == ['{"iteration": 1, "a": null, "b": null, "c": null, "d": 2.5}']
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["iteration"], record["d"]] == [1, 2.5]
    assert all(math.isnan(record[name]) for name in "abc")


@pytest.mark.parametrize("tail", ['{"iteration": 3, "rew', '{"iteration": 3, "rew\n', "\0\0\0"])
def test_torn_last_line_is_ignored_and_then_dropped(tmp_path: Path, tail: str) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1}\n{"iteration": 2, "a": null}\n' + tail)
    assert iterations(tmp_path) == [1, 2]
    with MetricsWriter(tmp_path, []) as writer:
        writer.write({"iteration": 3})
    assert lines(tmp_path) == ['{"iteration": 1}', '{"iteration": 2, "a": null}', '{"iteration": 3}']


def test_whole_last_line_without_its_end_is_kept(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1}\n{"iteration": 2}')
    with MetricsWriter(tmp_path, []) as writer:
        writer.write({"iteration": 3})
    assert iterations(tmp_path) == [1, 2, 3]


@pytest.mark.parametrize("damaged", ['{"iteration": 2', "[1]", "NULL"])
def test_damage_before_the_last_line_is_an_error(tmp_path: Path, damaged: str) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1}\n' + damaged + '\n{"iteration": 3}\n')
    with pytest.raises(CheckpointError, match=r"line 2 of .*metrics\.jsonl is damaged"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_metrics(tmp_path / "metrics.jsonl")
    (tmp_path / "metrics.jsonl").write_text("")
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_resume_appends_or_drops_what_will_be_computed_again(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, []) as writer:
        for iteration in range(1, 6):
            writer.write({"iteration": iteration, "a": math.nan})
    with MetricsWriter(tmp_path, [], keep_through=3) as writer:
        writer.write({"iteration": 4, "a": 7})
    assert iterations(tmp_path) == [1, 2, 3, 4]
    assert lines(tmp_path)[2:] == ['{"iteration": 3, "a": null}', '{"iteration": 4, "a": 7}']
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_resume_from_before_the_first_iteration(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1}\n')
    MetricsWriter(tmp_path, [], keep_through=0).close()
    assert lines(tmp_path) == []


def test_close_twice_and_after_an_error(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, [])
    with pytest.raises(KeyError), writer:
        raise KeyError
    writer.close()
    with pytest.raises(ValueError, match="closed"):
        writer.write({"iteration": 1})


def test_tensorboard_gets_the_same_numbers(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with MetricsWriter(tmp_path, ["tensorboard"]) as writer:
        writer.write({"iteration": 1, "reward/score": 0.5})
        writer.write({"iteration": 2, "reward/score": math.nan, "kl/reference": 3})
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert sorted(events.Tags()["scalars"]) == ["kl/reference", "reward/score"]
    assert [(event.step, event.value) for event in events.Scalars("kl/reference")] == [(2, 3.0)]
    first, second = events.Scalars("reward/score")
    assert (first.step, first.value, second.step) == (1, 0.5, 2)
    assert math.isnan(second.value)


def test_tensorboard_forgets_what_is_computed_again(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with MetricsWriter(tmp_path, ["tensorboard"]) as writer:
        for iteration in range(1, 6):
            writer.write({"iteration": iteration, "a": iteration})
    # Files are read in the order of their names, which begin with the second of their making.
    (first,) = (tmp_path / "tensorboard").iterdir()
    first.rename(first.with_name("events.out.tfevents.0000000001"))
    with MetricsWriter(tmp_path, ["tensorboard"], keep_through=3) as writer:
        writer.write({"iteration": 4, "a": 40})
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("a")] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]


def test_a_file_in_place_of_the_folder_of_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").write_text("")
    with pytest.raises(CheckpointError, match=r"tensorboard could not be written .* go on from the newest checkpoint"):
        MetricsWriter(tmp_path, ["tensorboard"])


def test_a_disk_that_is_full_for_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = pytest.importorskip("tensorboard.summary.writer.record_writer")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with MetricsWriter(tmp_path, ["tensorboard"]) as writer:
        writer.write({"iteration": 1, "a": 1.0})
        monkeypatch.setattr(records.RecordWriter, "flush", full)
        with pytest.raises(CheckpointError, match=r"tensorboard could not be written \(No space left on device\)"):
            writer.write({"iteration": 2, "a": 1.0})
    assert iterations(tmp_path) == [1, 2]


def test_tensorboard_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"pip install quartet-rlhf\[trackers\]"):
        MetricsWriter(tmp_path, ["tensorboard"])


def test_unknown_tracker(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'wandb', which is unknown; take 'tensorboard'"):
        MetricsWriter(tmp_path, ["wandb"])


def test_numbers_survive_the_round_trip(tmp_path: Path) -> None:
    record = {"iteration": 9, "a": 0.1 + 0.2, "b": 2**60, "c": 5e-324}
    with MetricsWriter(tmp_path, []) as writer:
        writer.write(record)
    assert read_metrics(tmp_path / "metrics.jsonl") == [record]
    assert json.loads(lines(tmp_path)[0]) == record
