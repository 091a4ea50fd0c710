"""The command line: a user's mistake ends in one sentence on stderr, exit code 2, and not a file written."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from checkpoints import FAMILIES, edit_json, make_tokenizer, write_adapter
from quartet.cli import main
from tiny import TinyRun, changed

Refused = Callable[..., str]


@pytest.fixture
def refused(tiny_run: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """refused(*overrides, **values): runs `quartet train` and returns the one sentence it ends with."""

    def run(*overrides: str, family: str = "llama", **values: Any) -> str:
        config = tmp_path / "run.yaml"
        config.write_text(yaml.safe_dump(tiny_run(family, **values)))
        before = files_in(tmp_path)
        capsys.readouterr()  # what writing the checkpoints said
        code = main(["train", str(config), *overrides])
        assert files_in(tmp_path) == before
        return sentence(code, capsys)

    return run


def sentence(code: int, capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert code == 2
    assert captured.err.startswith("quartet: ")
    assert captured.err.endswith("\n")
    assert captured.err.count("\n") == 1, captured.err
    assert "Traceback" not in captured.err
    assert len(captured.err) < 700
    return captured.err.removeprefix("quartet: ").rstrip("\n")


def files_in(folder: Path) -> dict[str, float]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.fixture
def copied(library: Any, tmp_path: Path) -> Callable[[str], Path]:
    """copied(name): a copy of a Llama checkpoint, to be damaged."""
    return lambda name: Path(shutil.copytree(library.path("llama", name), tmp_path / f"copy-{name}"))


def test_a_run_and_its_resumption(tiny_run: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(tiny_run()))
    capsys.readouterr()  # what writing the checkpoints said
    assert main(["train", str(config), "ppo.iterations=2", "run.seed=5"]) == 0
    run = tmp_path / "run"
    said = capsys.readouterr()
    assert said.err == ""
    assert f"policy: {run / 'policy'}" in said.out
    assert yaml.safe_load((run / "config.yaml").read_text())["run"]["seed"] == 5
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2
    assert main(["resume", str(run)]) == 0
    assert capsys.readouterr().err == ""


def test_folders_in_the_home_folder(tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(tiny_run()))
    assert main(["train", str(config), "run.dir=~/runs/first"]) == 0
    assert main(["export", "~/runs/first", "--out=~/result"]) == 0
    assert (tmp_path / "home/runs/first/policy").is_dir()
    assert (tmp_path / "home/result/policy").is_dir()
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("ppo.kl_coeff=0.1", "unknown key ppo.kl_coeff; did you mean ppo.kl_coef?"),
        ("modles.sft=x", "unknown key modles; did you mean models?"),
        ("ppo.clip=-1", "ppo.clip=-1 is not possible: input should be greater than 0"),
        ("ppo.clip=1e300", "ppo.clip=1e+300 is not possible: float32 holds no number beyond 3.4e38"),
        ("rewards=[{url: http://a.test, weight: -1e39}]", "rewards.0.weight=-1e+39 is not possible: float32 holds"),
        ("ppo.optimizer.betas=[0.9,1]", "ppo.optimizer.betas.1=1 is not possible: input should be less than 1"),
        ("ppo.optimizer.eps=1e-46", "ppo.optimizer.eps=1e-46 is not possible: input should be greater than"),
        ("ppo.lam=1.5", "ppo.lam=1.5 is not possible"),
        ("ppo.learning_rate=fast", "ppo.learning_rate='fast' is not possible"),
        ("rollout.batch_size=0", "rollout.batch_size=0 is not possible"),
        ("models.dtype=float16", "models.dtype='float16' is not possible: input should be"),
        ("ppo.minibatches=3", "rollout.batch_size=4 is not divisible by ppo.minibatches=3; choose a divisor"),
        ("models.sharing=paired", "models.sharing=paired shares frozen weights between roles and needs models.lora"),
        (
            "ppo.optimizer.warmup_iterations=1",
            "ppo.optimizer.warmup_iterations=1 leaves none of ppo.iterations=1 at the full learning rate; lower it",
        ),
        ("rollout.stop=", "the override 'rollout.stop=' has no value; write rollout.stop=null for none"),
        ("rewards=null", "rewards=None is not possible: it should be a list of entries, such as [{url: ...}]"),
        ("rewards=[{url: http://a.test, timeout: 1.0e10}]", "rewards.0.timeout=10000000000.0 is not possible"),
        ("rewards={url: http://a.test}", "is not possible: it should be a list of entries, such as [{url: ...}]"),
        ("models.sft=${oc.env:NOPE}", "the overrides 'models.sft=${oc.env:NOPE}' cannot be applied"),
        (
            "rewards=[{url: 'localhost:8000/x?model=1'}]",
            "'localhost:8000/x' is no url of a reward endpoint; write http(s)://",
        ),
        ("models.lora.dropout=0.1", "models.lora.dropout=0.1 is not possible"),
        ("ppo.iterations", "the override 'ppo.iterations' has no value; write it as dotted.key=value"),
        ("=3", "the override '=3' has no value"),
        ("ppo=3", "ppo=3 is not possible"),
        ("models.sft=", "models.sft"),
        ("ppo.clip=[1,", "ppo.clip=[1,"),
        ("rollout.stop=<nowhere>", "rollout.stop='<nowhere>' is 9 tokens in this vocabulary; name a single token"),
        ("rollout.stop=9999", "rollout.stop=9999 is not a token id; the vocabulary has 260 tokens"),
        ("rollout.response_length=60", "60 is 6"),
        ("data.prompts=nowhere.jsonl", "nowhere.jsonl does not exist"),
        ("models.sft=./nowhere", "models.sft='./nowhere' does not exist; give a checkpoint's folder or a Hub id"),
        ("models.sft=nobody/nothing-at-all", "models.sft='nobody/nothing-at-all' cannot be read"),
        ("models.device=cuda", "models.device=cuda, and torch sees no GPU here"),
        ("data.max_prompt_tokens=0", "data.max_prompt_tokens=0 is not possible"),
        (
            "ppo={minibatches: 2, adaptive_kl_target: 6, adaptive_kl_horizon: 3}",
            "ppo.adaptive_kl_horizon=3.0 is less than one iteration, rollout.batch_size=4 episodes",
        ),
        (
            "ppo.adaptive_kl_horizon=500",
            "ppo.adaptive_kl_horizon=500.0 is given, and nothing adapts ppo.kl_coef; set ppo.adaptive_kl_target, or leave",
        ),
        (
            "data.eval_prompts=a.txt",
            "data.eval_prompts='a.txt' is given, and data.eval_count=0 takes none of them; leave",
        ),
        ("data.column=text", "prompts.txt has no columns; leave it out"),
        ("data.split=test", "prompts.txt has no splits; leave it out"),
        (
            "ppo={adaptive_kl_target: 6, kl_coef: 0}",
            "ppo.adaptive_kl_target=6.0 multiplies ppo.kl_coef, which stays 0; start from another ppo.kl_coef",
        ),
    ],
)
def test_mistakes_in_the_configuration(override: str, said: str, refused: Refused) -> None:
    import torch

    if override == "models.device=cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert said in refused(override)


def test_missing_configuration_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["train", str(tmp_path / "absent.yaml")])
    assert "absent.yaml' does not exist; give the path of a YAML file" in sentence(code, capsys)


@pytest.mark.parametrize("content", ["a: [1, 2", "- 1\n- 2\n", "just text", "", "models: {sft: x}", "\x00", "a: ${b}"])
def test_unusable_configuration_file(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(content)
    sentence(main(["train", str(config)]), capsys)


def test_resuming_where_no_run_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        assert "holds no run (no config.yaml)" in sentence(main(["resume", str(folder)]), capsys)


@pytest.mark.parametrize("command", [["train"], ["plan"], ["resume"], ["eval"], ["report"], ["export", "--out", "x"]])
def test_a_name_that_no_file_system_takes(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "x' is too long for a path" in sentence(main([*command, "x" * 300]), capsys).replace("...", "'")


def test_absent_column(refused: Refused, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"question": "why?"}) + "\n")
    said = refused(f"data.prompts={file}")
    assert "has no column 'prompt'; set data.column to one of those it has: 'question'" in said


@pytest.mark.parametrize("suffix", ["", "/deeper"])
def test_run_folder_that_cannot_be_made(suffix: str, refused: Refused) -> None:
    assert "cannot be written" in refused(f"run.dir=/proc/quartet{suffix}")


def test_run_folder_in_use(refused: Refused, tmp_path: Path) -> None:
    used = tmp_path / "used"
    used.mkdir()
    (used / "notes.txt").write_text("mine")
    assert f"run.dir='{used}' is not empty; name a new or empty folder" in refused(f"run.dir={used}")
    (used / "config.yaml").write_text("models: {}")
    said = refused(f"run.dir={used}")
    assert f"run.dir='{used}' already holds a run" in said
    assert f"quartet resume {used}" in said
    assert "is a file" in refused(f"run.dir={used / 'notes.txt'}")


@pytest.mark.parametrize("key", ["sft", "reward"])
def test_pickled_weights(key: str, refused: Refused, copied: Callable[[str], Path]) -> None:
    folder = copied(key)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    said = refused(f"models.{key}={folder}")
    assert said.startswith(f"models.{key}='{folder}' holds pickled weights (.bin) only")


@pytest.mark.parametrize("key", ["sft", "reward"])
@pytest.mark.parametrize("damage", ["truncated", "header", "empty", "absent", "offsets"])
def test_damaged_weights(key: str, damage: str, refused: Refused, copied: Callable[[str], Path]) -> None:
    folder = copied(key)
    file = folder / "model.safetensors"
    content = file.read_bytes()
    if damage == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "header":
        file.write_bytes(content[:20] + b"!" + content[21:])
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "offsets":
        file.write_bytes(content.replace(b"data_offsets", b"data_0ffsets", 1))
    else:
        file.unlink()
    assert str(folder) in refused(f"models.{key}={folder}")


@pytest.mark.parametrize("key", ["sft", "reward"])
def test_damaged_adapter_weights(key: str, refused: Refused, copied: Callable[[str], Path]) -> None:
    folder = copied(f"{key}-lora")
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    assert str(file) in refused(f"models.{key}={folder}", "models.lora={}")
    file.unlink()
    assert "lacks adapter_model.safetensors" in refused(f"models.{key}={folder}", "models.lora={}")


@pytest.mark.parametrize("files", [("tokenizer.json",), ("tokenizer.json", "tokenizer_config.json")])
@pytest.mark.parametrize("key", ["sft", "reward"])
@pytest.mark.parametrize("family", FAMILIES)
def test_folder_without_tokenizer(
    family: str, key: str, files: tuple[str, ...], refused: Refused, library: Any, tmp_path: Path
) -> None:
    """For some families transformers makes up a tokenizer with next to no vocabulary."""
    folder = Path(shutil.copytree(library.path(family, key), tmp_path / "bare"))
    for name in files:
        (folder / name).unlink()
    assert f"models.{key}='{folder}' holds no tokenizer" in refused(f"models.{key}={folder}", family=family)


@pytest.mark.parametrize("content", ["{", "{}", '{"model": {"type": "BPE"}}'])
def test_damaged_tokenizer(content: str, refused: Refused, copied: Callable[[str], Path]) -> None:
    folder = copied("sft")
    (folder / "tokenizer.json").write_text(content)
    assert f"models.sft='{folder}'" in refused(f"models.sft={folder}")


def test_different_tokenizers(refused: Refused, copied: Callable[[str], Path]) -> None:
    folder = copied("reward")
    make_tokenizer(extra=("<more>",)).save_pretrained(folder)
    said = refused(f"models.reward={folder}")
    assert "have different vocabularies (260 and 261 tokens, 1 differ, such as '<more>')" in said


def test_tokenizer_larger_than_the_embedding(refused: Refused, library: Any, tmp_path: Path) -> None:
    overrides = []
    for key in ("sft", "reward"):
        folder = Path(shutil.copytree(library.path("llama", key), tmp_path / key))
        make_tokenizer(extra=("<more>",)).save_pretrained(folder)
        overrides.append(f"models.{key}={folder}")
    said = refused(*overrides)
    assert "the tokenizer has ids up to 260, and models.sft=" in said
    assert "has embeddings for 260 tokens" in said


@pytest.mark.parametrize("key", ["sft", "reward"])
@pytest.mark.parametrize("base", ["/absent/base", "", "nobody/nothing-at-all"])
def test_adapter_without_its_base(key: str, base: str, refused: Refused, copied: Callable[[str], Path]) -> None:
    folder = copied(f"{key}-lora")
    edit_json(folder / "adapter_config.json", base_model_name_or_path=base)
    said = refused(f"models.{key}={folder}", "models.lora={}")
    assert f"models.{key}='{folder}'" in said
    assert "base" in said


def test_adapter_of_another_kind(refused: Refused, copied: Callable[[str], Path]) -> None:
    folder = copied("sft-lora")
    edit_json(folder / "adapter_config.json", peft_type="IA3")
    assert "is a PEFT adapter of type IA3" in refused(f"models.sft={folder}")


@pytest.mark.parametrize("file", ["config.json", "adapter_config.json"])
@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_damaged_configurations(file: str, content: str, refused: Refused, copied: Callable[[str], Path]) -> None:
    folder = copied("sft" if file == "config.json" else "sft-lora")
    (folder / file).write_text(content)
    said = refused(f"models.sft={folder}")
    assert said.startswith("models.sft")
    assert str(folder) in said


def test_weights_file_instead_of_its_folder(refused: Refused, library: Any) -> None:
    file = library.path("llama", "sft") / "model.safetensors"
    assert "is a file; give the checkpoint's folder or a Hub id" in refused(f"models.sft={file}")


def test_single_where_it_is_not_possible(refused: Refused) -> None:
    said = refused("models.sharing=single", "models.lora={}")
    assert "is a full checkpoint; use models.sharing=paired" in said


def test_prompts_of_which_none_fits(refused: Refused, tmp_path: Path) -> None:
    file = tmp_path / "long.txt"
    file.write_text("a longer prompt\nanother one\n")
    said = refused(f"data.prompts={file}", "data.max_prompt_tokens=4")
    assert "2 are over data.max_prompt_tokens=4" in said
    assert "raise the limit" in said


def test_reward_function_that_is_not_there(refused: Refused) -> None:
    said = refused("rewards=[{function: 'quartet_absent_module:reward'}]")
    assert "quartet_absent_module" in said


def test_usage_mistakes_exit_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["trian"], ["train"], ["resume"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
        assert capsys.readouterr().err.startswith("usage: quartet")


@pytest.mark.parametrize("command", ["train", "plan"])
def test_overrides_may_stand_anywhere_after_the_file(
    command: str, tiny_run: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(tiny_run()))
    capsys.readouterr()  # what writing the checkpoints said
    option = ["--force"] if command == "train" else ["--memory", "24GiB"]
    given = [command, str(config), "ppo.epochs=1", *option, "ppo.minibatches=4", "ppo.minibatches=3"]
    assert "rollout.batch_size=4 is not divisible by ppo.minibatches=3" in sentence(main(given), capsys)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["plan", "x.yaml", "--json", "stray"], "unrecognized arguments: stray"),
        (["plan", "x.yaml", "a=1", "--jsn", "b=2"], "unrecognized arguments: --jsn b=2"),
        (["report", "run", "a=1"], "unrecognized arguments: a=1"),
        (["train"], "the following arguments are required: config\n"),
    ],
)
def test_arguments_that_mean_nothing(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("sft", "said"),
    [
        ("${oc.env:NOPE}", "models.sft in {file} cannot be filled in: Environment variable 'NOPE' not found"),
        ("${ppo.nope}", "models.sft in {file} cannot be filled in: Interpolation key 'ppo.nope' not found"),
    ],
)
@pytest.mark.parametrize("overrides", [[], ["run.seed=4"]])
def test_what_the_file_asks_for_and_is_not_there(
    sft: str, said: str, overrides: list[str], tiny_run: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(changed(tiny_run(), {"models.sft": sft})))
    capsys.readouterr()
    assert sentence(main(["train", str(config), *overrides]), capsys) == said.format(file=config)


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_a_closed_stream_leads_nowhere(closed: str, tmp_path: Path) -> None:
    command = f'"$0" -m quartet report "$1" {closed}'
    done = subprocess.run(["sh", "-c", command, sys.executable, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2
    assert ("holds no run" in done.stderr) is ("2>" not in closed)
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_stream_of_another_encoding_gets_numbers_for_what_it_lacks(
    tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(tiny_run()))
    run = tmp_path / "größe"
    assert main(["train", str(config), f"run.dir={run}"]) == 0
    assert f"policy: {tmp_path}/gr\\xf6\\xdfe/policy" in written.getvalue().decode("ascii")
    assert (run / "policy").is_dir()


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    from quartet import __version__

    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"quartet {__version__}\n"


def test_failure_in_the_run_names_what_is_kept(
    tiny_run: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], library: Any
) -> None:
    """Weights that are not finite: one sentence too, and the run folder holds the weights before."""
    from safetensors.torch import save_file

    sft = Path(shutil.copytree(library.path("llama", "sft"), tmp_path / "sft"))
    weights = load_file(sft / "model.safetensors")
    weights["lm_head.weight"][5] = float("nan")
    save_file(weights, sft / "model.safetensors", metadata={"format": "pt"})
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(changed(tiny_run(), {"models.sft": str(sft)})))
    capsys.readouterr()  # of writing the checkpoints
    said = sentence(main(["train", str(config)]), capsys)
    assert "the policy gave nan to episode" in said
    assert (tmp_path / "run" / "policy" / "model.safetensors").is_file()


def test_adapter_larger_than_the_configured(refused: Refused, library: Any, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "wide", library.path("llama", "sft"), rank=20)
    said = refused(f"models.sft={adapter}", "models.lora={}")
    assert "models.lora.r=16 is smaller than rank 20" in said


def test_libraries_add_nothing_to_what_is_said(tiny_run: TinyRun, tmp_path: Path) -> None:
    """In a process of its own, as a user starts it: what libraries log while they are imported would come first."""
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(changed(tiny_run(), {"models.lora": {"r": 400, "target_modules": ["nowhere"]}})))
    code = "import sys; from quartet.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "train", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2
    assert done.stderr.startswith("quartet: "), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert "WARNING" not in done.stdout


def test_deepspeed_says_nothing_of_the_device_it_found() -> None:
    """In a process of its own, which imports it once."""
    pytest.importorskip("deepspeed")
    code = (
        "from quartet.cli import _quiet_libraries; _quiet_libraries()\n"
        "from deepspeed.accelerator import get_accelerator; get_accelerator()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, check=True)
    assert done.stdout == ""
