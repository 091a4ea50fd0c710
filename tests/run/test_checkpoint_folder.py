"""Checkpoints that are killed, damaged, or meant to harm: what is read is whole, and nothing outside the folder is touched."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from quartet.errors import CheckpointError
from quartet.run import checkpoint, checkpoint_folder
from quartet.run.checkpoint import FILES, RunState, load_checkpoint, save_checkpoint
from quartet.run.checkpoint_folder import choose_checkpoint, list_checkpoints, verify


class Crash(BaseException):
    """Stands for a power cut: nobody cleans up after it."""


class Weights:
    """Two trained roles of a few numbers, and their optimizer; every number is that of the iteration."""

    def __init__(self, size: int = 40) -> None:
        self.parameters = {role: torch.nn.Parameter(torch.zeros(size)) for role in ("policy", "value")}
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=0.0, fused=True)
        for parameter in self.parameters.values():
            parameter.grad = torch.zeros(size)
        self.optimizer.step()

    def trained_parameters(self, role: str) -> list[tuple[str, torch.nn.Parameter]]:
        return [("weight", self.parameters[role])]

    def numbers(self) -> set[float]:
        moments = [state[name] for state in self.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
        return {float(n) for tensor in [*self.parameters.values(), *moments] for n in tensor.detach().unique()}

    def save(self, folder: Path, iteration: int, keep: int = 2) -> Path:
        with torch.no_grad():
            for parameter in self.parameters.values():
                parameter.fill_(iteration)
                for name in ("exp_avg", "exp_avg_sq"):
                    self.optimizer.state[parameter][name].fill_(iteration)
        state = RunState(iteration=iteration, episodes=4 * iteration, kl_coef=0.5)
        return save_checkpoint(folder, self, self.optimizer, state, keep=keep)  # type: ignore[arg-type]

    def load(self, folder: Path) -> RunState:
        return load_checkpoint(folder, self, self.optimizer)  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run" / "checkpoints"


@pytest.fixture
def saved(folder: Path) -> Path:
    weights = Weights()
    weights.save(folder, 1)
    weights.save(folder, 2)
    return folder


def assert_whole(folder: Path, expected: set[int]) -> int:
    """The newest checkpoint is whole and all of one iteration."""
    weights = Weights()
    state = weights.load(choose_checkpoint(folder, None))
    assert weights.numbers() == {float(state.iteration)}
    assert state == RunState(iteration=state.iteration, episodes=4 * state.iteration, kl_coef=0.5)
    assert state.iteration in expected
    return state.iteration


def crashing(patch: pytest.MonkeyPatch, at: int, after: bool) -> Callable[[], int]:
    """Every operation on the file system from here on is counted; the one numbered `at` is the last."""
    count = 0

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == at and not after:
                raise Crash
            result = original(*arguments, **options)
            if count == at:
                raise Crash
            return result

        return wrapper

    for owner, name in [(os, "fsync"), (os, "mkdir"), (os, "unlink"), (os, "rmdir"), (Path, "replace")]:
        patch.setattr(owner, name, counted(getattr(owner, name)))
    patch.setattr(Path, "write_text", counted(Path.write_text))
    patch.setattr(checkpoint, "save_file", counted(checkpoint.save_file))
    return lambda: count


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("after", [False, True])
def test_a_crash_at_any_operation_leaves_a_whole_checkpoint(keep: int, after: bool, tmp_path: Path) -> None:
    at, done = 0, False
    while not done:
        at += 1
        folder = tmp_path / str(at) / "checkpoints"
        weights = Weights()
        for iteration in range(1, keep + 1):
            weights.save(folder, iteration, keep)
        with pytest.MonkeyPatch.context() as patch:
            count = crashing(patch, at, after)
            try:
                weights.save(folder, keep + 1, keep)
                done = count() < at
            except Crash:
                pass
        assert_whole(folder, {keep, keep + 1})
        Weights().save(folder, keep + 2, keep)
        assert_whole(folder, {keep + 2})
        left = [path.name for path in folder.iterdir()]
        assert not [name for name in left if name.startswith(".")]
        assert len(left) <= keep + 1
    assert at > 20


def test_killed_while_saving(folder: Path) -> None:
    """SIGKILL at random moments of a process that does nothing but save."""
    draw, before = random.Random(7), 0
    Weights(200_000).save(folder, 1)
    for _ in range(6):
        child = os.fork()
        if child == 0:
            try:
                weights, iteration = Weights(200_000), before + 1
                while True:
                    weights.save(folder, iteration := iteration + 1)
            finally:
                os._exit(1)
        time.sleep(draw.uniform(0.02, 0.2))
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        weights = Weights(200_000)
        state = weights.load(choose_checkpoint(folder, None))
        assert weights.numbers() == {float(state.iteration)}
        assert state.iteration >= before
        before = state.iteration


@pytest.mark.parametrize("at", range(1, 5))
def test_a_disk_that_is_full(at: int, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After half a file, as a real disk does it; every file in turn."""
    files = 0

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def save(tensors: Any, path: Path) -> None:
        nonlocal files
        files += 1
        if files == at:
            path.write_bytes(b"half")
            full()
        original(tensors, path)

    original = checkpoint.save_file
    monkeypatch.setattr(checkpoint, "save_file", save)
    if at == 4:
        monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"step-000003 could not be written \(No space left on device\); earlier"):
        Weights().save(saved, 3)
    monkeypatch.undo()
    assert sorted(path.name for path in saved.iterdir()) == ["step-000001", "step-000002"]
    assert_whole(saved, {2})


def test_memory_and_disk_that_a_checkpoint_takes(folder: Path) -> None:
    """At most 1.1 times the bytes of weights and moments on the disk, and no second copy of them in memory."""
    weights = Weights(4_000_000)
    size = 2 * 3 * 4_000_000 * 4
    path = weights.save(folder, 1)
    assert size <= sum(file.stat().st_size for file in path.iterdir()) <= 1.1 * size
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here (proc_pid_clear_refs(5))
    before = status_bytes("VmRSS")
    weights.save(folder, 2)
    assert status_bytes("VmHWM") - before < 0.2 * size


def status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def test_a_checkpoint_of_the_same_name_is_replaced(saved: Path) -> None:
    Weights().save(saved, 2)
    assert_whole(saved, {2})
    assert sorted(path.name for path in saved.iterdir()) == ["step-000001", "step-000002"]


def test_order_is_by_number(folder: Path) -> None:
    weights = Weights()
    for iteration in (9, 10, 999_999, 1_000_000):
        weights.save(folder, iteration, keep=9)
    assert [int(path.name[5:]) for path in list_checkpoints(folder)] == [9, 10, 999_999, 1_000_000]


def test_choosing_by_name(saved: Path) -> None:
    assert choose_checkpoint(saved, "step-000001").name == "step-000001"
    for name in ("step-000003", "../checkpoints/step-000001", "", "/etc"):
        with pytest.raises(
            CheckpointError, match=r"has no checkpoint .*; choose one of those it has: step-000001, step-"
        ):
            choose_checkpoint(saved, name)
    with pytest.raises(CheckpointError, match="has no checkpoint to resume from"):
        choose_checkpoint(saved.parent, None)


def bit_flips(path: Path) -> Iterator[int]:
    """A few places of a file: both ends, and some between."""
    draw, size = random.Random(path.name), path.stat().st_size
    yield from {0, size - 1, *(draw.randrange(size) for _ in range(6))}


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_a_flipped_bit_anywhere_is_noticed(name: str, saved: Path) -> None:
    path = saved / "step-000002" / name
    content = path.read_bytes()
    for place in bit_flips(path):
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        with pytest.raises(CheckpointError) as caught:
            Weights().load(path.parent)
        assert "--from step-000001" in str(caught.value)
        assert "\n" not in str(caught.value)
    path.write_bytes(content)
    assert_whole(saved, {2})


def rewrite_manifest(step: Path, **changes: Any) -> None:
    """A manifest that agrees with the folder's files, as somebody who means harm would write it."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in step.iterdir()
        if path.name != "manifest.json"
    }
    (step / "manifest.json").write_text(json.dumps({"files": files | changes}))


class Harm:
    """Unpickling this makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", FILES)
def test_a_pickle_in_the_place_of_a_file_is_not_loaded(name: str, saved: Path, tmp_path: Path) -> None:
    step, mark = saved / "step-000002", tmp_path / "harmed"
    (step / name).write_bytes(pickle.dumps(Harm(mark)))
    rewrite_manifest(step)
    with pytest.raises(CheckpointError):
        Weights().load(step)
    torch.save(Harm(mark), step / name)
    rewrite_manifest(step)
    with pytest.raises(CheckpointError):
        Weights().load(step)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "..", "sub/file", "", "."])
def test_names_that_lead_out_of_the_folder_are_refused(name: str, saved: Path) -> None:
    step = saved / "step-000002"
    rewrite_manifest(step, **{name: {"bytes": 1, "sha256": ""}})
    with pytest.raises(CheckpointError, match="which is no file of this folder"):
        verify(step, FILES)


def test_a_manifest_that_leaves_a_file_out_is_refused(saved: Path) -> None:
    step = saved / "step-000002"
    manifest = json.loads((step / "manifest.json").read_text())
    del manifest["files"]["policy.safetensors"]
    (step / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"does not name policy\.safetensors"):
        verify(step, FILES)


def test_links_are_neither_read_nor_followed_when_removing(saved: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (saved / "step-000002").replace(outside)
    (saved / "step-000002").symlink_to(outside)
    assert [path.name for path in list_checkpoints(saved)] == ["step-000001"]
    before = sorted(path.name for path in outside.iterdir())
    for iteration in (3, 4, 5):
        Weights().save(saved, iteration, keep=1)
    assert sorted(path.name for path in outside.iterdir()) == before
    (saved / "step-000005" / "policy.safetensors").unlink()
    (saved / "step-000005" / "policy.safetensors").symlink_to(outside / "policy.safetensors")
    rewrite_manifest(saved / "step-000005")
    with pytest.raises(CheckpointError, match=r"policy\.safetensors is missing, truncated or altered"):
        verify(saved / "step-000005", FILES)


@pytest.mark.parametrize(
    "state",
    [
        *("[]", "{}", "null", '{"format": 1}', '{"format": 2}', '{"format": 1, "more": 2}', "[" * 99999),
        '{"format": 1, "iteration": -1, "episodes": 0, "kl_coef": 0.1}',
        '{"format": 1, "iteration": 1, "episodes": 0, "kl_coef": NaN}',
    ],
)
def test_a_state_that_is_none(state: str, saved: Path) -> None:
    step = saved / "step-000002"
    (step / "state.json").write_text(state)
    rewrite_manifest(step)
    with pytest.raises(CheckpointError, match="step-000002"):
        Weights().load(step)


@pytest.mark.parametrize("step", [3, torch.tensor(3.0)], ids=["whole number", "tensor"])
def test_the_step_of_an_optimizer_is_what_it_was(step: Any, folder: Path) -> None:
    """8-bit Adam counts in a whole number, which its kernels take; AdamW in a tensor of float32."""
    weights, others = Weights(), Weights()
    for own, count in ((weights, step), (others, step * 0)):
        own.optimizer = torch.optim.SGD(own.parameters.values())  # takes the state as it is given
        for parameter in own.parameters.values():
            own.optimizer.state[parameter] = {"step": count, "exp_avg": torch.zeros(40), "exp_avg_sq": torch.zeros(40)}
    others.load(weights.save(folder, 1))
    steps = [state["step"] for state in others.optimizer.state.values()]
    assert steps == [step] * 2
    assert {type(found) for found in steps} == {type(step)}
    assert all(found.dtype == torch.float32 for found in steps if isinstance(found, torch.Tensor))


def test_what_is_left_unfinished_is_not_listed(saved: Path) -> None:
    for name in (".writing-step-000003", ".removing-step-000001", "step-3", "step-00000x", "step-000003.bak"):
        (saved / name).mkdir()
        (saved / name / checkpoint_folder.MANIFEST).write_text("{}")
    assert [path.name for path in list_checkpoints(saved)] == ["step-000001", "step-000002"]
