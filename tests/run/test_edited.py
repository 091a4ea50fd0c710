"""A run's config.yaml edited before resuming: the run goes on longer, or elsewhere, and never as another run."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from quartet.cli import main
from quartet.config.load import known_keys
from quartet.errors import CheckpointError, ConfigError
from quartet.run.checkpoint_folder import list_checkpoints
from quartet.run.edited import MAY_CHANGE
from quartet.run.metrics import read_metrics
from quartet.trainer import resume, train
from tiny import TinyRun, edit_config

LORA = {"models.lora": {"r": 4, "alpha": 8.0}}


@pytest.fixture(scope="module")
def finished() -> list[Path]:
    return []


@pytest.fixture
def run(finished: list[Path], tiny_run: TinyRun, tmp_path: Path) -> Path:
    """A copy of a run of two iterations, which is trained once."""
    if not finished:
        finished.append(train(tiny_run(**{"ppo.iterations": 2, "run.save_every": 1}, **LORA)))
    return Path(shutil.copytree(finished[0], tmp_path / "copy"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"models.lora.alpha": 32.0},
            r"models\.lora\.alpha=32\.0 in .*config\.yaml, and the run was started with 8\.0: it",
        ),
        ({"models.lora": None}, r"models\.lora\.r=None in .*, and the run was started with 4: it would be another run"),
        ({"ppo.optimizer.name": "adamw8bit"}, "ppo.optimizer.name='adamw8bit' in .* was started with 'adamw'"),
        ({"rollout.batch_size": 8}, "rollout.batch_size=8 in .* was started with 4: "),
        ({"data.max_prompt_tokens": 8}, "data.max_prompt_tokens=8 in .* was started with 512"),
        ({"run.seed": 4}, "run.seed=4 in .* was started with 3: .* change it back, or start a new one$"),
        ({"rewards": [{"function": "a:b"}]}, "rewards.0.function='a:b' in .* was started with None"),
    ],
)
def test_what_would_be_another_run_is_refused(change: dict[str, Any], said: str, run: Path) -> None:
    edit_config(run, change)
    with pytest.raises(ConfigError, match=said):
        resume(run, trust=True)


def test_what_may_change_changes(run: Path) -> None:
    rows = {"ppo.microbatch_rows": 1, "rollout.batch_rows": 2, "models.gradient_checkpointing": True}
    edit_config(run, {"ppo.iterations": 4, "ppo.learning_rate": 5e-4, "run.keep": 1, **rows})
    resume(run)
    assert [record["lr"] for record in read_metrics(run / "metrics.jsonl")] == [1e-3, 1e-3, 5e-4, 5e-4]
    assert [path.name for path in list_checkpoints(run / "checkpoints")] == ["step-000004"]


def test_every_key_that_may_change_is_one() -> None:
    known = set(known_keys())
    for key in MAY_CHANGE:
        assert key.replace("rewards.*.", "rewards.").removesuffix(".*") in known, key


def test_the_keys_that_may_change_are_documented() -> None:
    """They, and no others."""
    text = (Path(__file__).parents[2] / "docs" / "reproducibility.md").read_text("utf-8")
    section = text.partition("\n## What may change\n")[2].partition("\n## ")[0]
    named = re.findall(r"`([\w*]+(?:\.[\w*]+)+)`", section.partition("\n- ")[2])
    assert sorted(named) == sorted(MAY_CHANGE)


def test_fewer_iterations_than_are_done(run: Path) -> None:
    edit_config(run, {"ppo.iterations": 1})
    with pytest.raises(
        ConfigError, match=r"ppo\.iterations=1, and 2 iterations are done already; raise it, or go back"
    ):
        resume(run)
    resume(run, start="step-000001")
    assert len(read_metrics(run / "metrics.jsonl")) == 1


def test_a_run_that_lost_what_it_was_started_with_is_refused(run: Path) -> None:
    inputs = json.loads((run / "inputs.json").read_text())
    del inputs["configuration"]
    (run / "inputs.json").write_text(json.dumps(inputs))
    with pytest.raises(CheckpointError, match=r"lacks the configuration that the run was started with; restore it"):
        resume(run)


def test_another_function_of_the_weights_is_not_exported(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_config(run, {"models.lora.alpha": 32.0, "ppo.clip": 0.3})
    capsys.readouterr()
    assert main(["export", str(run), "--out", str(tmp_path / "out")]) == 2
    assert "models.lora.alpha=32.0 in" in capsys.readouterr().err
    edit_config(run, {"models.lora.alpha": 8.0})
    assert main(["export", str(run), "--out", str(tmp_path / "out")]) == 0
