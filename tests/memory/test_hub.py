"""Planning a model on the Hub fetches its small files and the headers of its weights, and nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import NotASafetensorsRepoError
from huggingface_hub.utils import SafetensorsFileMetadata, SafetensorsRepoMetadata
from huggingface_hub.utils._safetensors import TensorInfo

from checkpoints import edit_json
from quartet.cli import main
from quartet.errors import CheckpointError
from quartet.models import checkpoint_info, hub_headers
from quartet.models.base_comparison import same_base
from quartet.models.checkpoint_info import ADAPTER_WEIGHTS, read_checkpoint

SMALL = ("config.json", "adapter_config.json")


class Hub:
    """Serves folders as repositories, and keeps count of what is asked for."""

    def __init__(self, folders: dict[str, Path]) -> None:
        self.folders = folders
        self.downloaded: list[str] = []
        self.headers: list[str] = []

    def cached_file(self, name: str, file: str, *, local_files_only: bool = False, **_: Any) -> str | None:
        path = self.folders[name] / file
        if local_files_only or not path.is_file():
            return None
        self.downloaded.append(file)
        return str(path)

    def file(self, name: str, file: str) -> SafetensorsFileMetadata:
        with (self.folders[name] / file).open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        self.headers.append(f"{name}/{file}")
        entries = {
            k: TensorInfo(v["dtype"], v["shape"], tuple(v["data_offsets"])) for k, v in header.items() if k[:2] != "__"
        }
        return SafetensorsFileMetadata({}, entries)

    def repository(self, name: str) -> SafetensorsRepoMetadata:
        found = self.file(name, "model.safetensors")
        return SafetensorsRepoMetadata(
            None, False, dict.fromkeys(found.tensors, "model.safetensors"), {"model.safetensors": found}
        )


@pytest.fixture
def hub(library: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for file in ("adapter_config.json", ADAPTER_WEIGHTS):
        (adapter / file).write_bytes((library.path("llama", "reward-lora") / file).read_bytes())
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="some/sft")
    made = Hub({"some/sft": library.path("llama", "sft"), "some/reward": adapter})
    monkeypatch.setattr(checkpoint_info, "cached_file", made.cached_file)
    config = checkpoint_info.AutoConfig.from_pretrained
    monkeypatch.setattr(
        checkpoint_info.AutoConfig,
        "from_pretrained",
        lambda name, **options: config(made.folders.get(name, name), **options),
    )
    monkeypatch.setattr(HfApi, "get_safetensors_metadata", lambda _, name: made.repository(name))
    monkeypatch.setattr(HfApi, "parse_safetensors_file_metadata", lambda _, name, file: made.file(name, file))
    return made


def test_only_headers_are_fetched_and_the_plan_is_that_of_local_folders(
    hub: Hub, library: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def plan(sft: str, reward: str) -> Any:
        values = {
            "models": {"sft": sft, "reward": reward, "lora": {"r": 4}, "dtype": "float32", "device": "cpu"},
            "data": {"prompts": "unread", "max_prompt_tokens": 16},
            "rollout": {"response_length": 8},
        }
        (tmp_path / "run.yaml").write_text(json.dumps(values))
        capsys.readouterr()
        assert main(["plan", str(tmp_path / "run.yaml"), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    remote = plan("some/sft", "some/reward")
    assert set(hub.downloaded) <= set(SMALL)
    assert set(hub.headers) == {"some/sft/model.safetensors", f"some/reward/{ADAPTER_WEIGHTS}"}
    local = plan(str(library.path("llama", "sft")), str(library.path("llama", "reward-lora")))
    assert remote["plan"] == local["plan"] == "single"
    assert remote["phases"] == local["phases"]


def test_weights_that_stay_on_the_hub_are_told_apart_by_repository(hub: Hub) -> None:
    hub.folders["other/sft"] = hub.folders["some/sft"]
    infos = [read_checkpoint(name, "sft", headers_only=True) for name in ("some/sft", "some/sft", "other/sft")]
    assert same_base(infos[0], infos[1])
    assert not same_base(infos[0], infos[2])


def test_what_the_hub_does_not_give_is_one_sentence(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (NotASafetensorsRepoError("no such file"), ConnectionError("no network"), *_http_errors()):

        def fail(*_: Any, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(HfApi, "get_safetensors_metadata", fail)
        with pytest.raises(CheckpointError, match=r"models\.sft='some/sft': the headers .*no (such file|network)"):
            read_checkpoint("some/sft", "sft", headers_only=True)


def _http_errors() -> list[Exception]:
    """Of the HTTP library that the Hub's client is built on."""
    return [kind("no network") for kind in hub_headers.HfHubHTTPError.__bases__ if kind is not OSError]
