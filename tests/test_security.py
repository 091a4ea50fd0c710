"""Nothing Quartet reads can run code: a malicious pickle at every door, and a look at the source for ways in."""

from __future__ import annotations

import ast
import contextlib
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import quartet
from checkpoints import edit_json
from quartet.cli import main
from quartet.config import parse_config
from quartet.errors import CheckpointError
from quartet.models.pickled import open_checkpoint
from quartet.trainer import train
from tiny import TinyRun, as_if_started_with, changed

ROOT = Path(quartet.__file__).parent
UNPICKLERS = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"}
CALLS = {"eval", "exec", "compile", "__import__"}
METHODS = {"unsafe_load", "full_load", "load_all", "read_pickle", "loads_pickle"}


class Harm:
    """Unpickling this makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_source_unpickles_nothing(path: Path) -> None:
    own = str(path.relative_to(ROOT)) == "models/pickled.py"
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [str(node.module)]
            assert own or not {name.split(".")[0] for name in names} & UNPICKLERS, f"line {node.lineno}"
        if not isinstance(node, ast.Call):
            continue
        options = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
        assert not options.get("shell"), f"line {node.lineno}: a shell"
        assert not options.get("allow_pickle"), f"line {node.lineno}"
        if isinstance(node.func, ast.Name):
            assert node.func.id not in CALLS, f"line {node.lineno}: {node.func.id}"
        if isinstance(node.func, ast.Attribute):
            called = ast.unparse(node.func)
            assert node.func.attr not in METHODS, f"line {node.lineno}: {called}"
            assert called not in ("yaml.load", "numpy.load", "np.load", "pickle.load", "pickle.loads"), (
                f"line {node.lineno}"
            )
            if called in ("torch.load", "torch.hub.load", "torch.jit.load"):
                assert own, f"line {node.lineno}: {called}"
                assert options["weights_only"] is True, f"line {node.lineno}"


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """Exists if harm was done."""
    return tmp_path / "harmed"


def harm_with_torch(path: Path, mark: Path) -> None:
    torch.save({"weight": torch.zeros(2), "more": Harm(mark)}, path)


def harm_plainly(path: Path, mark: Path) -> None:
    path.write_bytes(pickle.dumps(Harm(mark)))


def harm_in_the_old_format(path: Path, mark: Path) -> None:
    torch.save(Harm(mark), path, _use_new_zipfile_serialization=False)


WAYS = [harm_with_torch, harm_plainly, harm_in_the_old_format]


def one_sentence(code: int, capsys: pytest.CaptureFixture[str]) -> str:
    said = capsys.readouterr().err
    assert (code, said.count("\n"), "Traceback" in said) == (2, 1, False), said
    return said


def test_the_harm_is_real(tmp_path: Path, mark: Path) -> None:
    for way in WAYS:
        way(tmp_path / "file", mark)
        with contextlib.suppress(
            RuntimeError
        ):  # what it finds first is not what it looks for, and by then it is too late
            torch.load(tmp_path / "file", weights_only=False)
        assert mark.exists()
        mark.unlink()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("allowed", [False, True])
@pytest.mark.parametrize(
    ("key", "remove", "file"),
    [
        ("models.sft", "model.safetensors", "pytorch_model.bin"),
        ("models.reward", "model.safetensors", "pytorch_model.bin"),
        ("models.sft", None, "model.safetensors"),
        ("models.reward", None, "model.safetensors"),
        ("models.sft", "adapter_model.safetensors", "adapter_model.bin"),
        ("models.sft", None, "tokenizer.json"),
        ("models.sft", None, "config.json"),
    ],
)
def test_pickles_in_a_checkpoint(
    key: str,
    remove: str | None,
    file: str,
    allowed: bool,
    way: Callable[[Path, Path], None],
    tiny_run: TinyRun,
    library: Any,
    tmp_path: Path,
    mark: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name = key.removeprefix("models.") + ("-lora" if file.startswith("adapter") else "")
    folder = shutil.copytree(library.path("llama", name), tmp_path / "copy")
    if remove is not None:
        (folder / remove).unlink()
    way(folder / file, mark)
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(tiny_run(**{key: str(folder), "models.allow_pickle": allowed})))
    capsys.readouterr()
    one_sentence(main(["train", str(config)]), capsys)
    assert not mark.exists()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "name", ["p.txt", "p.jsonl", "p.json", "p.csv", "p.parquet", "p.pkl", "p.pickle", "folder/p.pkl"]
)
def test_pickles_as_prompts(
    name: str, tiny_run: TinyRun, tmp_path: Path, mark: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    harm_plainly(file, mark)
    config = tmp_path / "run.yaml"
    source = file if file.parent == tmp_path else file.parent
    config.write_text(yaml.safe_dump(tiny_run(**{"data.prompts": str(source)})))
    capsys.readouterr()
    one_sentence(main(["train", str(config)]), capsys)
    assert not mark.exists()


def test_yaml_that_asks_for_objects(
    tiny_run: TinyRun, tmp_path: Path, mark: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(tiny_run())
    harm = f"models: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{mark}']]\n"
    (tmp_path / "run.yaml").write_text(harm)
    capsys.readouterr()
    one_sentence(main(["train", str(tmp_path / "run.yaml")]), capsys)
    (run / "config.yaml").write_text(harm)
    one_sentence(main(["resume", str(run)]), capsys)
    assert not mark.exists()


def test_reward_functions_are_imported_only_from_the_users_own_configuration(
    tiny_run: TinyRun, tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run folder from elsewhere, with a module lying beside it."""
    run = train(tiny_run())
    (tmp_path / "harm.py").write_text(
        f"import pathlib\npathlib.Path({str(mark)!r}).touch()\ndef score(p, r): return [0.0] * len(r)\n"
    )
    as_if_started_with(run, {"rewards": [{"function": "harm:score"}]})
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    capsys.readouterr()
    assert "names the reward function harm:score" in one_sentence(main(["resume", str(run)]), capsys)
    assert not mark.exists()
    assert main(["resume", str(run), "--trust"]) == 0
    assert mark.exists()


def pickled(folder: Path, *, parts: int = 1) -> Path:
    """The same checkpoint as transformers wrote it in the past."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if not {"lm_head.weight", "score.weight"} & weights.keys() and "model.embed_tokens.weight" in weights:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]  # tied: one memory under two names
    if parts == 1:
        torch.save(weights, folder / "pytorch_model.bin")
        return folder
    names = sorted(weights)
    places = {name: f"pytorch_model-{1 + number % parts:05d}-of-{parts:05d}.bin" for number, name in enumerate(names)}
    for part in set(places.values()):
        torch.save({name: weights[name] for name in names if places[name] == part}, folder / part)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_allowed_pickles_train_as_the_same_safetensors(
    family: str, parts: int, tiny_run: TinyRun, library: Any, tmp_path: Path
) -> None:
    values = tiny_run(family, **{"models.lora": {"r": 4}})
    plain = train(values)
    copies = {
        f"models.{key}": str(pickled(shutil.copytree(library.path(family, key), tmp_path / key), parts=parts))
        for key in ("sft", "reward")
    }
    run = train(changed(values, {**copies, "models.allow_pickle": True, "run.dir": str(tmp_path / "pickled")}))
    for role in ("policy", "value"):
        one, other = (load_file(folder / role / "adapter_model.safetensors") for folder in (plain, run))
        for name in one:  # in files of their own, tensors lie at other addresses, and matrix products round differently
            torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-5 if parts > 1 else 0.0)
    named = json.loads((run / "policy" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == copies["models.sft"]


def test_an_adapter_over_a_pickled_base(tiny_run: TinyRun, library: Any, tmp_path: Path) -> None:
    base = pickled(shutil.copytree(library.path("llama", "sft"), tmp_path / "base"))
    adapter = shutil.copytree(library.path("llama", "sft-lora"), tmp_path / "adapter")
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=str(base))
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    models = parse_config(
        tiny_run(**{"models.sft": str(adapter), "models.allow_pickle": True, "models.lora": {}})
    ).models
    before = {path: path.read_bytes() for path in [*base.iterdir(), *adapter.iterdir()]}
    info = open_checkpoint(models, "sft")
    assert (info.name, info.origin) == (str(adapter), str(base))
    original = load_file(library.path("llama", "sft-lora") / "adapter_model.safetensors")
    assert info.adapter_tensors.keys() == original.keys()
    assert open_checkpoint(models, "sft").base == info.base  # converted once
    assert {path: path.read_bytes() for path in [*base.iterdir(), *adapter.iterdir()]} == before


def test_an_index_that_leads_out_of_the_folder(tiny_run: TinyRun, library: Any, tmp_path: Path) -> None:
    folder = pickled(shutil.copytree(library.path("llama", "sft"), tmp_path / "sft"), parts=2)
    torch.save({}, tmp_path / "outside.bin")
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../outside.bin"}}))
    models = parse_config(tiny_run(**{"models.sft": str(folder), "models.allow_pickle": True})).models
    with pytest.raises(CheckpointError, match="does not name the files beside it"):
        open_checkpoint(models, "sft")


def test_a_safetensors_index_that_leads_out_of_the_folder(tiny_run: TinyRun, library: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(library.path("llama", "sft"), tmp_path / "sft"))
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    models = parse_config(tiny_run(**{"models.sft": str(folder)})).models
    for weight_map in ({"a": "../outside.safetensors"}, {"a": str(tmp_path / "outside.safetensors")}, {}, [], None):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(CheckpointError, match="does not name the files beside it"):
            open_checkpoint(models, "sft")


def test_the_runs_own_configuration_fills_nothing_in_and_has_no_key_twice(
    tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run folder from elsewhere may not have the environment's secrets told."""
    run = train(tiny_run())
    monkeypatch.setenv("A_SECRET", "hunter2")
    plain = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(plain.replace("kl_coef: 0.05", "kl_coef: ${oc.env:A_SECRET}"))
    capsys.readouterr()
    assert "hunter2" not in one_sentence(main(["resume", str(run)]), capsys)
    (run / "config.yaml").write_text(plain + "run: {seed: 4}\n")
    assert "found duplicate key run in line" in one_sentence(main(["resume", str(run)]), capsys)


def test_a_place_that_may_not_be_read(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def closed(*_: Any) -> None:
        raise PermissionError(13, "Permission denied", "/root/\x1b[31mred")

    monkeypatch.setattr("quartet.config.load_config", closed)
    said = one_sentence(main(["train", "x.yaml"]), capsys)
    assert said == "quartet: no permission to use '/root/\\x1b[31mred'; check whose it is\n"


def test_remote_code_is_shown_when_on(tiny_run: TinyRun, capsys: pytest.CaptureFixture[str]) -> None:
    train(tiny_run(**{"models.trust_remote_code": True}))
    assert "models.trust_remote_code is on: code that the checkpoints bring along runs" in capsys.readouterr().out
