"""Bytes of quantized backbones against bitsandbytes and torchao."""

from typing import Any

import pytest
import torch

from checkpoints import write_model
from pipeline import Pipeline
from quartet.memory.choices import choices_of, workload_of
from quartet.memory.estimate import Estimator
from quartet.memory.quantized import quantized_bytes

pytest.importorskip("bitsandbytes")
pytest.importorskip("torchao")


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("8bit", 128 * 256 + 4 * 128),
        ("torchao-int8", 128 * 256 + 4 * 128 + 128),
        ("4bit", 16384 + 512 + 8 + 4 * 273),
    ],
)
def test_quantized_bytes(kind: str, expected: int) -> None:
    assert quantized_bytes((128, 256), kind) == expected


def tensors_in(held: Any, seen: dict[int, int]) -> None:
    """Storages of a tensor, a quantization state, or what a module keeps aside."""
    if hasattr(held, "__tensor_flatten__"):
        for name in held.__tensor_flatten__()[0]:
            tensors_in(getattr(held, name), seen)
    elif isinstance(held, torch.Tensor):
        seen[held.untyped_storage().data_ptr()] = held.untyped_storage().nbytes()
        for extra in ("quant_state", "SCB", "CB"):
            tensors_in(getattr(held, extra, None), seen)
    elif type(held).__name__ in ("QuantState", "MatmulLtState"):
        for extra in ("absmax", "code", "offset", "state2", "CB", "SCB"):
            tensors_in(getattr(held, extra, None), seen)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["4bit", "8bit", "torchao-int8"])
def test_bytes_equal_those_of_a_quantized_model(tiny_run: Any, tmp_path: Any, kind: str, dtype: str) -> None:
    wide = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}
    for name, task in (("sft", "lm"), ("reward", "classifier")):
        write_model(tmp_path / name, "llama", task=task, **wide)
    values = tiny_run(**{"models.lora": {"r": 4}, "models.sharing": "paired", "models.quantization": kind})
    values["models"]["dtype"] = dtype
    values["models"] |= {"sft": str(tmp_path / "sft"), "reward": str(tmp_path / "reward")}
    pipeline = Pipeline(values)
    device = torch.device("cpu")
    estimator = Estimator(pipeline.inputs.sft, pipeline.inputs.reward, workload_of(pipeline.config), device)
    estimate = estimator.estimate(pipeline.inputs.plan, choices_of(pipeline.config, device))
    pipeline.iterate()
    for backbone in estimate.backbones:
        seen: dict[int, int] = {}
        model = pipeline.roles.backbones[backbone.name].model
        for tensor in (*model.parameters(), *model.buffers()):
            tensors_in(tensor, seen)
        for module in model.modules():
            tensors_in(getattr(module, "state", None), seen)
        assert backbone.weights + backbone.adapters == pytest.approx(
            sum(seen.values()), rel=1e-3 if kind != "torchao-int8" else 1e-9
        )
