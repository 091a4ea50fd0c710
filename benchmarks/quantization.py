"""What quantized frozen weights do to the gradients of the adapters on them: direction, and whether a rollout changes them.

For each format: the bytes of both backbones under the paired plan; the cosine between the adapters' gradients and those over
float32 weights, of the policy (log-probabilities times random advantages) and of the value model (squared error to random
returns); and whether the gradients after a rollout equal those before it bit by bit. Adapters of rank 16 whose B matrices
are random, 8 sequences of 48 tokens, 32 of them response; checkpoints with random weights (benchmarks/peer/make_models.py).

usage: python benchmarks/quantization.py [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from harness import heading, machine, make_models, own_versions, parser, write_json

from quartet.config import LoraConfig, ModelsConfig
from quartet.models.checkpoint_info import read_checkpoint
from quartet.models.loading import load_roles, plan_for
from quartet.models.roles import Roles
from quartet.records import Prompts, Sequences
from quartet.rollout.choose import make_engine
from quartet.rollout.engine import SamplingSettings

KINDS = (None, "8bit", "torchao-int8", "4bit")
ROWS, PROMPT, RESPONSE = 8, 16, 32
SEED = 0


def load(root: Path, kind: str | None) -> Roles:
    """The paired plan over one format, with adapters that do something."""
    models = ModelsConfig(
        sft=str(root / "policy"),
        reward=str(root / "reward"),
        lora=LoraConfig(r=16),
        sharing="paired",
        quantization=kind,
        dtype="float32",
        device="cpu",
    )
    sft, reward = read_checkpoint(models.sft, "sft"), read_checkpoint(models.reward, "reward")
    roles = load_roles(models, plan_for(models, sft, reward), sft, reward, seed=SEED)
    torch.manual_seed(SEED)
    for backbone in roles.backbones.values():
        for name, parameter in backbone.model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.02)
    return roles


def held(roles: Roles) -> int:
    """Bytes of the frozen weights, each storage once; the scales of quantized layers included."""
    from memory_plan_worker import add_storages

    storages: dict[int, int] = {}
    for backbone in roles.backbones.values():
        for part in backbone.model.modules():
            for tensor in (*part._parameters.values(), *part._buffers.values(), getattr(part, "state", None)):
                if tensor is None or not getattr(tensor, "requires_grad", False):
                    add_storages(tensor, storages)
    return sum(storages.values())


def gradients(roles: Roles) -> dict[str, torch.Tensor]:
    """All gradients of policy and value, each role's in one vector."""
    draw = torch.Generator().manual_seed(SEED)
    lengths = torch.full((ROWS,), PROMPT), torch.full((ROWS,), RESPONSE)
    sequences = Sequences(torch.randint(3, 8000, (ROWS, PROMPT + RESPONSE), generator=draw), *lengths)
    mask = torch.ones(ROWS, RESPONSE, dtype=torch.bool)
    advantages, returns = torch.randn(2, ROWS, RESPONSE, generator=draw)
    roles.trained.zero_grad(set_to_none=True)
    logprobs, _, values = roles.trained(sequences, mask, mask, temperature=1.0, with_entropy=False, entropy_grad=False)
    ((logprobs * advantages).mean() + (values - returns).square().mean()).backward()
    found = {}
    for role in ("policy", "value"):
        parts = [p.grad for _, p in roles.trained_parameters(role)]  # type: ignore[arg-type]
        found[role] = torch.cat([part.flatten() for part in parts if part is not None])
    return found


def roll_out(roles: Roles) -> None:
    """A few tokens, without gradients."""
    engine = make_engine("auto", roles.policy, SamplingSettings(4, 1.0, 1.0, None, 0, 2, SEED), lambda _: None)
    engine.generate(Prompts((0, 1), ("", ""), (torch.tensor([5, 6, 7]), torch.tensor([8, 9]))))


def row(root: Path, kind: str | None, full: dict[str, torch.Tensor] | None) -> tuple[dict[str, Any], Any]:
    """The figures of one format, and its gradients."""
    roles = load(root, kind)
    before = gradients(roles)
    roll_out(roles)
    after = gradients(roles)
    cosine = {
        role: torch.cosine_similarity(before[role].double(), (full or before)[role].double(), dim=0).item()
        for role in before
    }
    same = all(torch.equal(before[role], after[role]) for role in before)
    return {"kind": kind or "float32", "bytes": held(roles), "cosine": cosine, "same_after_rollout": same}, before


def main() -> None:
    """Print the table; write the raw figures."""
    options: argparse.Namespace = parser(__doc__).parse_args()
    sizes = ["S"] if options.quick else ["S", "M"]
    make_models(options, sizes, early=False)
    torch.set_num_threads(options.threads)
    versions = {"quartet": own_versions() | {"torchao": version("torchao")}}
    print(heading(versions, options.threads))
    figures: dict[str, Any] = {"machine": machine(), "versions": versions, "seed": SEED, "rows": []}
    print("\n| size | frozen weights | MiB | cosine, policy | cosine, value | gradients after a rollout |")
    print("|---|---|---|---|---|---|")
    for size in sizes:
        full = None
        for kind in KINDS:
            found, vectors = row(options.models / size, kind, full)
            full = full or vectors
            figures["rows"].append({"size": size, **found})
            cosines = " | ".join(f"{found['cosine'][role]:.4f}" for role in ("policy", "value"))
            same = "equal" if found["same_after_rollout"] else "DIFFERENT"
            print(f"| {size} | {found['kind']} | {found['bytes'] / 2**20:.1f} | {cosines} | {same} |", flush=True)
            write_json(options.json, figures)


if __name__ == "__main__":
    main()
