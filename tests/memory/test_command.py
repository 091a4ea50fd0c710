"""`quartet plan` from a YAML file to tables, JSON and exit codes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from quartet.cli import main
from quartet.config import parse_config
from quartet.errors import ConfigError
from quartet.memory import free
from quartet.memory.admission import predicted_and_measured, refuse_too_large
from quartet.memory.choices import choices_of
from quartet.memory.estimate import estimator_for
from quartet.memory.free import free_memory
from quartet.models.checkpoint_info import read_checkpoint
from quartet.models.loading import plan_for

SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 300,
}
SEVENTY = {
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "intermediate_size": 28672,
    "vocab_size": 128256,
}
BASE = 80 * (2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 28672 + 2 * 8192) + 128256 * 8192 + 8192
"""Parameters of Llama 3 70B without its LM head."""
LORA_16 = 80 * 16 * (2 * (8192 + 8192) + 2 * (8192 + 1024) + 3 * (8192 + 28672))
"""Rank 16 on the seven linear layers of every layer: r * (in + out) each."""


def plan(tmp_path: Path, values: dict[str, Any], *arguments: str) -> int:
    """Run the command on a YAML file of these values."""
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    return main(["plan", str(tmp_path / "run.yaml"), *arguments])


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a tensor is an error."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr("quartet.models.checkpoint_info.safe_open", refuse)
    monkeypatch.setattr("quartet.models.base_comparison.digest_of", refuse)


@pytest.mark.usefixtures("no_weights")
def test_seventy_billion_parameters_from_headers(tmp_path: Path, hollow: Any, capsys: Any) -> None:
    values = hollow(SEVENTY, **{"models.lora": {"r": 16}, "models.dtype": "bfloat16"})
    capsys.readouterr()
    assert plan(tmp_path, values, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["plan"] == "paired"
    policy, value = result["backbones"]
    assert (policy["parameters"], value["parameters"]) == (BASE + 128256 * 8192, BASE)
    assert policy["mapped"] == policy["parameters"] * 2
    assert policy["adapters"] == value["adapters"] == LORA_16 * 4
    roles = {role["role"]: role for role in result["roles"]}
    assert roles["policy"]["gradients"] == LORA_16 * 4
    assert roles["value"]["optimizer"] == (2 * (LORA_16 + 8192) + 80 * 7 * 2 + 1) * 4
    # Rows * tokens * key heads * head size * (keys and values) * layers * bytes; columns in multiples of 16.
    assert result["phases"]["rollout"]["kv_cache"] == 32 * 576 * 8 * 128 * 2 * 80 * 2


def test_planning_leaves_compiler_and_garbage_collection_alone(tmp_path: Path, hollow: Any) -> None:
    """A plan is to be there in seconds; torch's compiler alone takes one to import."""
    if not hasattr(torch.compiler, "set_default_backend"):
        pytest.skip("torch before 2.12 has its compiler imported by bitsandbytes")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(hollow(SMALL, **{"models.lora": {"r": 4}})))
    code = (
        "import gc, sys; from quartet.cli import main; assert main(sys.argv[1:]) == 0; import torch;"
        "print(gc.isenabled(), torch.compiler.get_default_backend(), 'torch._inductor.compile_fx' in sys.modules,"
        "gc.get_freeze_count() > 10 * len(gc.get_objects()))"  # what the imports made is not looked over again
    )
    command = [sys.executable, "-c", code, "plan", str(tmp_path / "run.yaml"), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "True inductor False True"


def test_json_has_stable_keys(tmp_path: Path, hollow: Any, capsys: Any) -> None:
    values = hollow(SMALL)
    capsys.readouterr()
    assert plan(tmp_path, values, "--json", "--memory", "10GiB") == 0
    result = json.loads(capsys.readouterr().out)
    assert sorted(result) == [
        "backbones",
        "choices",
        "device",
        "peak",
        "phases",
        "plan",
        "roles",
        "search",
        "traffic",
        "version",
        "workload",
    ]
    assert result["version"] == 1
    assert sorted(result["phases"]) == ["load", "rollout", "scoring", "update"]
    assert sorted(result["phases"]["update"]) == [
        "activations",
        "at",
        "gathered",
        "gradients",
        "kv_cache",
        "libraries",
        "logits",
        "optimizer",
        "peak",
        "trunk_states",
        "weights",
    ]
    assert sorted(result["roles"][0]) == [
        "adapters",
        "backbone",
        "gradients",
        "head",
        "optimizer",
        "paged",
        "role",
        "trained_parameters",
    ]
    assert sorted(result["backbones"][0]) == [
        "adapters",
        "checkpoint",
        "mapped",
        "name",
        "parameters",
        "roles",
        "trained",
        "weights",
    ]
    assert result["search"]["change"] == {}
    for phase in result["phases"].values():
        parts = [count for name, count in phase.items() if name not in ("peak", "at")]
        assert phase["peak"] == pytest.approx(sum(parts))


def test_tables_name_roles_and_phases(tmp_path: Path, hollow: Any, capsys: Any) -> None:
    values = hollow(SMALL)
    capsys.readouterr()
    assert plan(tmp_path, values) == 0
    text = capsys.readouterr().out
    for word in ("policy", "reference", "value", "reward", "load", "rollout", "scoring", "update", "peak:", "█"):
        assert word in text


def test_nothing_fits_is_the_users_mistake_and_says_how_much(tmp_path: Path, hollow: Any, capsys: Any) -> None:
    values = hollow(SMALL)
    capsys.readouterr()
    assert plan(tmp_path, values, "--json", "--memory", "1MiB") == 2
    result = json.loads(capsys.readouterr().out)["search"]
    assert (result["fits"], result["config"]) == (False, None)
    assert result["missing"] == result["smallest"]["bytes"] - 2**20 > 0
    assert plan(tmp_path, values, "--memory", "1MiB") == 2
    assert "nothing fits into 1.00 MiB" in " ".join(capsys.readouterr().out.split())


def test_the_yaml_of_a_search_trains_as_it_is(
    tiny_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a narrow terminal too, and with changes that no default has."""
    monkeypatch.setattr("quartet.memory.command.WIDTH", 40)
    values = tiny_run("llama", **{"models.lora": {"r": 5}, "ppo.minibatches": 1, "ppo.microbatch_rows": 4})
    capsys.readouterr()
    assert plan(tmp_path, values, "--json") == 0
    update = json.loads(capsys.readouterr().out)["phases"]["update"]["peak"]
    assert plan(tmp_path, values, "--memory", f"{int(update) - 4096}B") == 0
    printed = capsys.readouterr().out.partition("ready to use:")[2]
    assert yaml.safe_load(printed)["models"]["sft"] == values["models"]["sft"]
    assert yaml.safe_load(printed) != values
    (tmp_path / "found.yaml").write_text(printed)
    assert main(["train", str(tmp_path / "found.yaml")]) == 0
    assert (tmp_path / "run" / "policy" / "adapter_config.json").is_file()


def test_train_refuses_what_does_not_fit_unless_forced(hollow: Any) -> None:
    values = hollow(SMALL)
    config = parse_config(values)
    sft, reward = read_checkpoint(config.models.sft, "sft"), read_checkpoint(config.models.reward, "reward")
    estimator = estimator_for(config, sft, reward, longest_prompt=8, evaluated=0)
    estimate = estimator.estimate(plan_for(config.models, sft, reward), choices_of(config, estimator.device), None)
    refuse_too_large(estimate, None)
    refuse_too_large(estimate, round(estimate.peak.peak) + 1)
    with pytest.raises(ConfigError, match="--force"):
        refuse_too_large(estimate, round(estimate.peak.peak) - 1)
    refuse_too_large(estimate, 1, force=True)
    both = predicted_and_measured(estimate, {"update": 123})
    assert both["phases"]["update"]["measured"] == 123
    assert both["phases"]["load"]["measured"] is None
    assert both["workload"]["longest_prompt"] == 8


def test_free_memory_is_no_more_than_the_machine_has() -> None:
    free = free_memory(torch.device("cpu"))
    assert free is None or 0 < free < 2**50


CGROUP_2 = {
    "cgroup": "0::/jobs/mine\n",
    "jobs/mine/memory.max": "max\n",
    "jobs/mine/memory.current": "700\n",
    "jobs/memory.max": "1000\n",
    "jobs/memory.current": "800\n",
    "jobs/memory.stat": "anon 500\nfile 300\nactive_file 100\ninactive_file 150\nshmem 50\n",
}
"""The group around the process's own has a limit; 250 of its 800 bytes are pages of files."""
CGROUP_1 = {
    "cgroup": "5:cpu:/\n4:memory,pids:/outside/of/the/container\n0::/\n",
    "memory/memory.limit_in_bytes": "2000\n",
    "memory/memory.usage_in_bytes": "900\n",
    "memory/memory.stat": "active_file 0\ninactive_file 25\n",
}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (CGROUP_2, 450),
        (CGROUP_1, 1125),
        (CGROUP_1 | {"memory/memory.limit_in_bytes": "9223372036854771712\n"}, 5 * 1024),
        (CGROUP_2 | {"jobs/memory.current": "2000\n", "jobs/memory.stat": ""}, 0),
        ({"cgroup": ""}, 5 * 1024),
    ],
)
def test_limits_of_control_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], expected: int
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "meminfo").write_text("MemTotal:  9 kB\nMemAvailable:       5 kB\n")
    for name, path in (("_MOUNT", tmp_path), ("_CGROUP", tmp_path / "cgroup"), ("_MEMINFO", tmp_path / "meminfo")):
        monkeypatch.setattr(free, name, path)
    assert free_memory(torch.device("cpu")) == expected


def test_wrong_arguments(tmp_path: Path, hollow: Any, capsys: pytest.CaptureFixture[str]) -> None:
    values = hollow(SMALL)
    with pytest.raises(SystemExit) as stopped:
        plan(tmp_path, values, "--processes", "0")
    assert stopped.value.code == 2
    capsys.readouterr()
    assert plan(tmp_path, values, "--memory", "24 gigs") == 2
    assert "24 gigs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "arguments", "words"),
    [
        ({}, ("--processes", "3"), "rollout.batch_size=64 cannot be cut into ppo.minibatches=1"),
        ({"distributed.engine": "none"}, ("--processes", "2"), "distributed.engine=none is for one process"),
        ({"models.freeze_layers": 1}, ("--processes", "2", "--engine", "zero3"), "models.freeze_layers=1 lets two"),
        (
            {"models.lora": {"r": 4}, "models.offload": "cpu", "models.device": "cuda"},
            ("--processes", "2", "--engine", "fsdp2", "--memory", "1MiB"),
            "models.offload=cpu has nothing to move under the paired plan where weights are cut",
        ),
        (
            {"ppo.optimizer": {"name": "adamw8bit"}},
            ("--processes", "2", "--engine", "fsdp2"),
            "distributed.engine=fsdp2 cannot cut",
        ),
    ],
)
def test_what_several_processes_cannot_do(
    tmp_path: Path, hollow: Any, capsys: Any, changes: dict[str, Any], arguments: tuple[str, ...], words: str
) -> None:
    values = hollow(SMALL, **changes)
    capsys.readouterr()
    assert plan(tmp_path, values, *arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("quartet: ")
    assert words in said
    assert len(said.splitlines()) == 1


def test_loading_has_room_for_the_tensor_that_is_converted(
    tmp_path: Path, hollow: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest, where the files are in another dtype than frozen roles compute in."""
    monkeypatch.setenv("QUARTET_CACHE", str(tmp_path / "cache"))
    peaks = []
    for dtype in ("bfloat16", "float32"):
        values = hollow(SMALL | {"vocab_size": 200_000}, **{"models.dtype": dtype, "models.lora": {"r": 4}})
        capsys.readouterr()
        assert plan(tmp_path, values, "--json") == 0
        peaks.append(json.loads(capsys.readouterr().out)["phases"]["load"]["peak"])
    stored = read_checkpoint(str(tmp_path / "sft"), "sft").tensors["lm_head.weight"].dtype
    converted, mapped = peaks if stored == "F32" else reversed(peaks)
    embeddings = 200_000 * 64 * (2 if stored == "F32" else 4)
    assert mapped < embeddings < converted < embeddings + 2**22


def test_automatic_engine_is_that_of_training(tmp_path: Path, hollow: Any, capsys: Any) -> None:
    for lora, engine in ((None, "fsdp2"), ({"r": 4}, "ddp")):
        values = hollow(SMALL, **{"models.lora": lora})
        capsys.readouterr()
        assert plan(tmp_path, values, "--processes", "2", "--json") == 0
        assert json.loads(capsys.readouterr().out)["choices"]["engine"] == engine


def test_gathering_for_the_rollout_is_decided_by_the_memory(tmp_path: Path, hollow: Any, capsys: Any) -> None:
    """Whole where the policy takes at most half of what is left after loading."""
    many = ("--processes", "4", "--engine", "fsdp2")
    values = hollow(SMALL, **{"models.dtype": "float32"})
    capsys.readouterr()
    plan(tmp_path, values, *many)
    assert "assumed: the whole policy fits" in capsys.readouterr().out
    plan(tmp_path, values, *many, "--json")
    first = json.loads(capsys.readouterr().out)
    assert first["choices"]["gather_for_rollout"] is True
    policy = first["backbones"][0]["parameters"] * 4
    for memory, whole in ((2.02 * policy, True), (1.98 * policy, False)):
        plan(tmp_path, values, *many, "--json", "--memory", str(round(first["phases"]["load"]["peak"] + memory)))
        assert json.loads(capsys.readouterr().out)["choices"]["gather_for_rollout"] is whole
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    assert main(["plan", str(tmp_path / "run.yaml"), "distributed.gather_for_rollout=false", *many]) == 0
    assert "assumed" not in capsys.readouterr().out


@pytest.mark.parametrize(("length", "fits"), [(63, True), (64, False)])
def test_a_response_that_leaves_no_room_for_a_prompt_is_refused(
    length: int, fits: bool, tmp_path: Path, hollow: Any, capsys: Any
) -> None:
    """As `quartet train` does whatever the prompts are."""
    values = hollow(SMALL | {"max_position_embeddings": 64}, **{"rollout.response_length": length})
    capsys.readouterr()
    assert plan(tmp_path, values) == (0 if fits else 2)
    said = "rollout.response_length=64 leaves no room for a prompt in the 64 positions of models.sft="
    assert (said in capsys.readouterr().err) is not fits
