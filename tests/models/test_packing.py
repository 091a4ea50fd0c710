"""Sequences side by side: the numbers and gradients of the padded layout, under every family, and where it is not allowed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from checkpoints import FAMILIES, edit_json
from pipeline import Pipeline, rollout_of, sequences
from quartet.models import backbone, packing
from quartet.models.as_in_training import as_in_training
from quartet.models.layout import Layout, PackedLayout, Places, filled_up, packed_now
from quartet.models.packing import allow_packing
from quartet.stages.batching import SequenceTable
from tiny import TinyRun

PROMPTS = [[5, 9, 30, 31, 32], [7], [64, 65]]
RESPONSES = [[40, 41, 42, 43], [50, 51], [60, 61, 257]]
LORA: dict[str, Any] = {"models.lora": {"r": 5}}
PACKED = [family for family in FAMILIES if family != "gemma2"]
"""Gemma2 has an attention of its own, for its soft-capping."""
FULL: dict[str, Any] = {"models.lora": None}


def gradients(pipeline: Pipeline, packed_to: int) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Log-probabilities, entropies and values of the sequences, and the gradients of a weighted sum of them."""
    batch, mask = sequences(PROMPTS, RESPONSES)
    roles = pipeline.roles
    for view in (roles.policy, roles.value):
        assert view.backbone.packs_up_to > 0
        view.backbone.packs_up_to = packed_to
    pipeline.loaded.optimizer.zero_grad(set_to_none=True)
    logprobs, entropy, values = roles.trained(batch, mask, mask, temperature=1.0, with_entropy=True, entropy_grad=True)
    assert entropy is not None
    weights = torch.linspace(-1, 2, mask.numel()).view(mask.shape)
    sum(((numbers * weights).sum() for numbers in (logprobs, entropy, values)), torch.zeros(())).backward()
    return [logprobs.detach(), entropy.detach(), values.detach()], pipeline.gradients()


def fill_up_to(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for bfloat16, in float32."""
    monkeypatch.setattr(backbone, "tile_of", lambda *_: tile)


@pytest.mark.parametrize(("checkpointing", "tile"), [(False, 1), (True, 1), (False, 8), (True, 8)])
@pytest.mark.parametrize("changes", [FULL, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("family", PACKED)
def test_numbers_and_gradients_are_those_of_padded_rows(
    family: str,
    changes: dict[str, Any],
    checkpointing: bool,
    tile: int,
    tiny_run: TinyRun,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fill_up_to(tile, monkeypatch)
    pipeline = Pipeline(tiny_run(family, **changes, **{"models.gradient_checkpointing": checkpointing}))
    packed, padded = gradients(pipeline, 99), gradients(pipeline, 0)
    for one, other in zip(packed[0], padded[0], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert any(gradient.abs().max() > 0 for gradient in padded[1].values())
    for name, gradient in padded[1].items():
        torch.testing.assert_close(packed[1][name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max() + 1))


@pytest.mark.parametrize("tile", [1, 8])
def test_the_top_alone_runs_side_by_side(tile: int, tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """From trunk states that scoring kept row by row."""
    fill_up_to(tile, monkeypatch)
    pipeline = Pipeline(tiny_run(**FULL, **{"models.freeze_layers": 1}))
    batch = pipeline.advantages(pipeline.score(rollout_of(PROMPTS, RESPONSES)))
    table, found = SequenceTable.of(batch.scored.rollout), []
    for longest in (99, 0):
        for view in (pipeline.roles.policy, pipeline.roles.value):
            view.backbone.packs_up_to = longest
        pipeline.updater()._gradients(batch, table, [0, 1, 2])
        found.append(pipeline.gradients())
    for name, gradient in found[1].items():
        torch.testing.assert_close(found[0][name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("changes", [FULL, LORA], ids=["full", "lora"])
def test_no_padding_is_computed_and_the_last_mlp_sees_what_is_read(changes: dict[str, Any], tiny_run: TinyRun) -> None:
    pipeline = Pipeline(tiny_run(**changes))
    batch, mask = sequences(PROMPTS, RESPONSES)
    seen: list[int] = []
    layers: Any = pipeline.roles.policy.backbone.transformer.layers
    for layer in (layers[0], layers[-1]):
        layer.mlp.up_proj.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[:-1].numel()))
    pipeline.roles.policy(batch, mask, temperature=1.0)
    tokens, read = 5 + 4 + 1 + 2 + 2 + 3, 4 + 2 + 3 + 3  # each response and the token before it
    assert seen == [tokens, read]
    seen.clear()
    with torch.no_grad():  # scoring, as the checkpoints compute alone
        pipeline.roles.policy(batch, mask, temperature=1.0)
    assert seen == [3 * 9, 3 * 9]
    seen.clear()
    with torch.no_grad(), as_in_training():  # numbers that training is compared with
        pipeline.roles.policy(batch, mask, temperature=1.0)
    assert seen == [tokens, read]


def test_in_bfloat16_tokens_are_filled_up_to_few_shapes(tiny_run: TinyRun) -> None:
    """oneDNN compiles a kernel for each; 17 tokens, 12 that are read and 9 of logits come to 32, rows of 9 cells to 16."""
    pipeline = Pipeline(tiny_run(**FULL, **{"models.dtype": "bfloat16"}))
    batch, mask = sequences(PROMPTS, RESPONSES)
    policy, seen = pipeline.roles.policy, set[int]()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func._schema.name in ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"):
                seen.update(size for t in args if isinstance(t, Tensor) for size in t.shape)
            return func(*args, **(kwargs or {}))

    with Watch():
        policy(batch, mask, temperature=1.0)[0].sum().backward()
    assert {16, 32} <= seen
    assert not seen & {9, 12, 17}, "the lengths themselves"


def test_sequences_longer_than_the_sliding_window_are_padded(tiny_run: TinyRun, tmp_path: Path) -> None:
    tree = tiny_run("qwen2", **FULL)
    windows = {"use_sliding_window": True, "sliding_window": 11, "layer_types": ["sliding_attention"] * 2}
    for key in ("sft", "reward"):
        copied = Path(shutil.copytree(tree["models"][key], tmp_path / key))
        edit_json(copied / "config.json", **windows)
        tree["models"][key] = str(copied)
    policy = Pipeline(tree).roles.policy
    for length, kind in ((11, PackedLayout), (12, Layout)):
        batch, mask = sequences([[5, 6], [7]], [[8] * (length - 2), list(range(9, 18))])
        assert type(policy.backbone.lay_out(batch)) is kind
        with torch.no_grad():
            padded = policy(batch, mask, temperature=1.0)[0]
        torch.testing.assert_close(policy(batch, mask, temperature=1.0)[0].detach(), padded, rtol=1e-5, atol=1e-5)


def test_a_model_that_mixes_tokens_elsewhere_is_padded(tiny_run: TinyRun) -> None:
    """A layer that looks at its left neighbour would look into another sequence."""
    pipeline = Pipeline(tiny_run(**FULL))
    backbone = pipeline.roles.policy.backbone
    backbone.packs_up_to = 0
    layer: Any = backbone.transformer.layers[0]
    handle = layer.register_forward_pre_hook(lambda _, inputs: (inputs[0] + inputs[0].roll(1, dims=1), *inputs[1:]))
    allow_packing(pipeline.roles)
    assert backbone.packs_up_to == 0
    assert not any(getattr(module, "is_last", False) for module in backbone.model.modules())
    handle.remove()
    allow_packing(pipeline.roles)
    assert backbone.packs_up_to > 99


def test_a_small_leak_is_found(tiny_run: TinyRun) -> None:
    """A hundredth of the left neighbour is less than bfloat16 rounds, and wrong all the same."""
    pipeline = Pipeline(tiny_run(**FULL, **{"models.dtype": "bfloat16"}))
    backbone = pipeline.roles.policy.backbone
    assert backbone.packs_up_to > 0
    backbone.packs_up_to = 0
    layer: Any = backbone.transformer.layers[0]
    layer.register_forward_pre_hook(lambda _, inputs: (inputs[0] + 0.01 * inputs[0].roll(1, dims=1), *inputs[1:]))
    allow_packing(pipeline.roles)
    assert backbone.packs_up_to == 0


def test_a_model_that_does_not_run_side_by_side_is_padded(tiny_run: TinyRun) -> None:
    pipeline = Pipeline(tiny_run(**FULL))
    backbone = pipeline.roles.policy.backbone
    backbone.packs_up_to = 0

    def fail(*_: Any) -> None:
        if packed_now() is not None:
            raise TypeError("'NoneType' object is not subscriptable")

    backbone.transformer.layers[0].register_forward_pre_hook(fail)  # type: ignore[operator, index, union-attr]
    allow_packing(pipeline.roles)
    assert backbone.packs_up_to == 0
    assert packed_now() is None
    pipeline.iterate()


@pytest.mark.parametrize("refused", ["policy", "value"])
def test_one_backbone_has_one_verdict(refused: str, tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = Pipeline(tiny_run("llama", reward="reward-lora", **LORA, **{"models.sharing": "single"}))
    roles = pipeline.roles
    assert roles.policy.backbone is roles.value.backbone
    roles.policy.backbone.packs_up_to = 0
    monkeypatch.setattr(packing, "_agrees", lambda _, adapter: adapter != refused)
    allow_packing(roles)
    assert roles.policy.backbone.packs_up_to == 0


def test_a_model_with_an_attention_of_its_own_is_padded(tiny_run: TinyRun) -> None:
    pipeline = Pipeline(tiny_run("gemma2", **FULL))
    assert [view.backbone.packs_up_to for view in (pipeline.roles.policy, pipeline.roles.value)] == [0, 0]


def test_a_layout_ends_with_its_pass(tiny_run: TinyRun) -> None:
    pipeline = Pipeline(tiny_run(**FULL))
    batch, mask = sequences(PROMPTS, RESPONSES)
    layer: Any = pipeline.roles.policy.backbone.transformer.layers[0]

    def fail(*_: Any) -> None:
        assert packed_now() is not None
        raise RuntimeError("in the middle")

    layer.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        pipeline.roles.policy(batch, mask, temperature=1.0)
    assert packed_now() is None


def test_places_and_their_gradients() -> None:
    places = Places.of(np.array([[True, False, True], [False, False, True]]), torch.device("cpu"))
    long, short = torch.arange(12.0).view(6, 2), torch.tensor([[1.0, 2], [3, 4], [5, 6]])
    assert places.shorten(long).tolist() == [[0, 1], [4, 5], [10, 11]]
    assert places.lengthen(short).tolist() == [[1, 2], [0, 0], [3, 4], [0, 0], [0, 0], [5, 6]]
    for act, rows in ((places.shorten, long), (places.lengthen, short)):
        assert torch.autograd.gradcheck(act, rows.double().requires_grad_())


def test_rows_that_fill_up_pass_on_no_gradient() -> None:
    places = Places.of(np.array([False, True, False, True, True]), torch.device("cpu"), 4)
    long, short = (torch.arange(float(rows)).view(rows, 1).requires_grad_() for rows in (5, 4))
    shortened, lengthened = places.shorten(long), places.lengthen(short)
    assert shortened.flatten().tolist() == [1, 3, 4, 1]
    assert lengthened.flatten().tolist() == [0, 0, 0, 1, 2]
    shortened.backward(torch.tensor([[1.0], [10], [100], [1000]]))
    lengthened.backward(torch.tensor([[1.0], [10], [100], [1000], [10000]]))
    assert long.grad is not None
    assert long.grad.flatten().tolist() == [0, 1, 0, 10, 100]
    assert short.grad is not None
    assert short.grad.flatten().tolist() == [10, 1000, 10000, 0]
    assert filled_up(torch.tensor([5, 7, 9]), 4).tolist() == [5, 7, 9, 5]
    assert not len(filled_up(torch.empty(0), 4))


def test_where_the_states_lie() -> None:
    batch, _ = sequences(PROMPTS, RESPONSES)
    padded, packed = Layout.padded(batch), PackedLayout.of(batch)
    assert packed.arguments["input_ids"][0].tolist() == [
        t for p, r in zip(PROMPTS, RESPONSES, strict=True) for t in p + r
    ]
    assert packed.arguments["position_ids"][0].tolist() == [*range(9), *range(3), *range(5)]
    assert padded.first.tolist() == [4, 9, 19]
    assert padded.last.tolist() == [8, 11, 22]
    assert packed.first.tolist() == [0, 5, 8]
    assert packed.last.tolist() == [4, 7, 11]
    assert packed.before_every_step(4).tolist() == [[0, 1, 2, 3], [5, 6, 7, 7], [8, 9, 10, 11]]
