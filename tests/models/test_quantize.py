"""Quantized frozen backbones: gradients are right, before and after a rollout, and heads keep their precision."""

from __future__ import annotations

import copy
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

from quartet.config import LoraConfig, ModelsConfig, parse_config
from quartet.errors import CheckpointError, ConfigError
from quartet.models.checkpoint_info import read_checkpoint
from quartet.models.loading import load_roles, plan_for
from quartet.models.offload import Offloaded
from quartet.models.quantize import DequantizingLinear
from quartet.models.roles import Roles
from quartet.records import Prompts, Sequences
from quartet.rollout.dynamic import DynamicEngine
from quartet.rollout.engine import SamplingSettings

pytest.importorskip("bitsandbytes")
pytest.importorskip("torchao")
KINDS = ("4bit", "8bit", "torchao-int8")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("quantized")
    config = LlamaConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        vocab_size=97,
        pad_token_id=0,
        eos_token_id=2,
    )
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(config).save_pretrained(root / "sft")
    config = copy.deepcopy(config)
    config.num_labels = 1
    AutoModelForSequenceClassification.from_config(config).save_pretrained(root / "reward")
    return root / "sft", root / "reward"


def load(folders: tuple[Path, Path], quantization: str | None, dtype: str = "float32", **others: Any) -> Roles:
    given = {"lora": LoraConfig(r=4), "quantization": quantization, "dtype": dtype} | others
    models = ModelsConfig(sft=str(folders[0]), reward=str(folders[1]), **given)
    sft, reward = read_checkpoint(models.sft, "sft"), read_checkpoint(models.reward, "reward")
    roles = load_roles(models, plan_for(models, sft, reward), sft, reward, seed=0)
    torch.manual_seed(5)
    for backbone in roles.backbones.values():
        for name, parameter in backbone.model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.05)
    return roles


def gradients(roles: Roles) -> dict[str, torch.Tensor]:
    sequences = Sequences(torch.arange(3, 39).reshape(3, 12) % 97, torch.tensor([4, 5, 6]), torch.tensor([8, 7, 6]))
    mask = torch.arange(8) < sequences.response_lengths[:, None]
    roles.trained.zero_grad(set_to_none=True)
    logprobs, _, values = roles.trained(sequences, mask, mask, temperature=1.0, with_entropy=False, entropy_grad=False)
    (logprobs.sum() + values.square().sum()).backward()
    found = {}
    for role in ("policy", "value"):
        for name, parameter in roles.trained_parameters(role):
            assert parameter.grad is not None, f"{name} got no gradient"
            found[f"{role}.{name}"] = parameter.grad.clone()
    return found


def roll_out(roles: Roles) -> None:
    settings = SamplingSettings(6, 1.0, 1.0, None, 0, 4, 0)
    prompts = Prompts((0, 1), ("a", "b"), (torch.tensor([5, 6, 7]), torch.tensor([8, 9])))
    DynamicEngine(roles.policy, settings).generate(prompts)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_after_a_rollout_equal_those_before(folders: tuple[Path, Path], kind: str, dtype: str) -> None:
    roles = load(folders, kind, dtype)
    before = gradients(roles)
    roll_out(roles)
    after = gradients(roles)
    assert before.keys() == after.keys()
    for name, gradient in before.items():
        torch.testing.assert_close(after[name], gradient, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_recomputed_activations_change_no_gradient(folders: tuple[Path, Path], kind: str) -> None:
    plain, recomputing = (load(folders, kind, gradient_checkpointing=given) for given in (False, True))
    roll_out(recomputing)
    expected = gradients(plain)
    # LLM.int8 rounds activations too: a last bit that differs may become a step of 1/127 of the row's largest.
    least = 0.05 if kind == "8bit" else 1e-5
    for name, gradient in gradients(recomputing).items():
        difference = ((gradient - expected[name]).norm() / expected[name].norm()).item()
        assert difference < least, (name, difference)


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_no_layer_keeps_a_whole_weight_for_the_backward_pass(folders: tuple[Path, Path], kind: str | None) -> None:
    """In floating point it would take what quantization saved."""
    roles = load(folders, kind)
    weights = [p for backbone in roles.backbones.values() for p in backbone.model.parameters()]
    mapped = {weight.data_ptr() for weight in weights if type(weight) is torch.nn.Parameter}
    shapes, kept = {(64, 64), (128, 64), (64, 128)}, []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.is_floating_point()
        if plain and tuple(tensor.shape) in shapes and tensor.data_ptr() not in mapped:
            kept.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        gradients(roles)
    assert not kept


@pytest.mark.parametrize(("dtype", "most"), [("float32", 1e-6), ("bfloat16", 0.02)])
def test_torchaos_gradients_are_those_of_its_own_pass(
    folders: tuple[Path, Path], dtype: str, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16 it rounds gradients times scales, and we weights: 2^-8 each, over two layers."""
    ours = gradients(load(folders, "torchao-int8", dtype))
    monkeypatch.setattr(DequantizingLinear, "forward", torch.nn.Linear.forward)
    theirs = gradients(load(folders, "torchao-int8", dtype))
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).norm() <= most * gradient.norm(), name


def test_eight_bit_layers_do_not_talk_at_every_product(
    folders: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.NOTSET)
    gradients(load(folders, "8bit"))
    assert "MatMul8bitLt" not in caplog.text


def test_in_full_fine_tuning_only_frozen_roles_are_quantized(folders: tuple[Path, Path]) -> None:
    roles, full = (load(folders, kind, lora=None) for kind in ("8bit", None))
    for name, backbone in roles.backbones.items():
        weights = {p.dtype for p in backbone.model.get_submodule("model.layers").parameters() if p.ndim == 2}
        assert weights == {torch.float32 if name in ("policy", "value") else torch.int8}
    sequences = Sequences(torch.arange(3, 39).reshape(3, 12) % 97, torch.tensor([4, 5, 6]), torch.tensor([8, 7, 6]))
    mask = torch.arange(8) < sequences.response_lengths[:, None]
    with torch.no_grad():
        policy, reference, exact = (
            role(sequences, mask, temperature=1.0)[0] for role in (roles.policy, roles.reference, full.reference)
        )
    assert torch.equal(policy, exact)
    # The reference is the checkpoint up to the rounding of its weights, and the KL starts there.
    assert 1e-5 < (reference - exact).abs().max() < 0.05


@pytest.mark.parametrize(("kind", "least"), [("4bit", 0.90), ("8bit", 0.99), ("torchao-int8", 0.99)])
def test_gradients_point_where_full_precision_points(folders: tuple[Path, Path], kind: str, least: float) -> None:
    full, quantized = gradients(load(folders, None)), gradients(load(folders, kind))
    one = torch.cat([full[name].flatten() for name in full])
    other = torch.cat([quantized[name].flatten() for name in full])
    assert torch.cosine_similarity(one, other, dim=0).item() > least


@pytest.mark.parametrize("kind", KINDS)
def test_heads_and_adapters_stay_float32(folders: tuple[Path, Path], kind: str) -> None:
    roles = load(folders, kind, "bfloat16")
    trained = [p for role in ("policy", "value") for _, p in roles.trained_parameters(role)]
    assert {p.dtype for p in trained} == {torch.float32}
    assert roles.reward.head.weight.dtype == torch.float32
    assert roles.policy.backbone.model.get_output_embeddings().weight.dtype == torch.bfloat16
    weight = roles.policy.backbone.model.get_submodule("model.layers.0.mlp.up_proj").base_layer.weight
    if kind == "torchao-int8":
        assert weight.qdata.dtype == torch.int8
        assert weight.act_quant_kwargs is None  # activations are not rounded
    else:
        assert weight.dtype == (torch.int8 if kind == "8bit" else torch.uint8)


def test_rows_that_are_no_whole_blocks_are_refused(tmp_path: Path, folders: tuple[Path, Path]) -> None:
    config = LlamaConfig(
        hidden_size=48, num_hidden_layers=1, num_attention_heads=4, intermediate_size=96, vocab_size=97
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "odd")
    with pytest.raises(ConfigError, match=r"whole blocks of 64 .* 48 inputs"):
        load((tmp_path / "odd", folders[1]), "4bit")


def test_four_bit_weights_can_leave_and_come_back(folders: tuple[Path, Path]) -> None:
    roles = load(folders, "4bit")
    expected = gradients(roles)
    moved = Offloaded(roles.plan, roles.backbones, torch.device("cpu"), pin=False)
    before = {p.data_ptr() for p in roles.backbones["reward"].model.parameters()}
    moved.use("reward")
    assert {p.data_ptr() for p in roles.backbones["reward"].model.parameters()} != before
    moved.use("policy")
    moved.use("policy", "value")
    found = gradients(roles)
    assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize("kind", ["torchao-int8-dynamic", "torchao-int4", "quanto-int4", "hqq"])
def test_formats_with_wrong_gradients_are_refused_by_name(kind: str) -> None:
    with pytest.raises(ConfigError, match=rf"models\.quantization.*{kind} .*; use 4bit, 8bit or torchao-int8"):
        parse_config({"models": {"sft": "a", "reward": "b", "quantization": kind}, "data": {"prompts": "c"}})


def test_checkpoints_that_are_quantized_already_are_refused(tmp_path: Path, folders: tuple[Path, Path]) -> None:
    folder = Path(shutil.copytree(folders[0], tmp_path / "gptq"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    with pytest.raises(
        CheckpointError, match=r"gptq' is already quantized \(gptq\), .* give the full-precision checkpoint"
    ):
        read_checkpoint(str(folder), "sft")
