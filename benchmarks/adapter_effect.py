"""How much of what an adapter changes rollouts in bfloat16 keep: with the adapter apart, and added to copies of the weights.

A sum of weight and adapter in bfloat16 is the weight again where the adapter's part is under half of the weight's last digit.
For adapters from far below that to well above it: the change of the response tokens' log-probabilities against no adapter, in
float32 (the effect), and how the same change under an engine in bfloat16 goes with it.

kept    slope of the engine's change over the effect, through zero; 1 keeps all of it
error   standard deviation of the difference, in nats; without an adapter that is the noise of bfloat16

usage: python benchmarks/adapter_effect.py [--quick] [--json FILE] [--only S M]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from harness import heading, machine, make_models, own_versions, parser, run_worker, write_json

SPREADS = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
"""Standard deviations of the entries of B."""


def work(options: argparse.Namespace) -> dict[str, Any]:
    """Slopes and errors for each spread."""
    import torch
    from probe import LORA_ALPHA, LORA_RANK
    from quartet_worker import configuration
    from torch import Tensor

    from quartet.rollout.static_decoder import generating
    from quartet.run.setup import load_everything, read_inputs
    from quartet.stages.batching import SequenceTable, microbatches

    def loaded(dtype: str) -> Any:
        options.dtype = dtype
        with tempfile.TemporaryDirectory() as folder:
            config = configuration(options, Path(folder))
            inputs = read_inputs(config, lambda _: None)
            return inputs, load_everything(config, inputs, lambda _: None)

    (inputs, low), (_, exact) = loaded("bfloat16"), loaded("float32")
    rounded = dict(low.roles.policy.backbone.model.named_parameters())
    wide = dict(exact.roles.policy.backbone.model.named_parameters())
    for name, parameter in wide.items():
        parameter.data = rounded[name].data.float()  # the same model
    rollout = low.rollout.generate(inputs.prompts.batch(0, options.episodes, 7))
    mask, table = rollout.response_mask, SequenceTable.of(rollout)

    def logprobs(models: Any, *, merged: bool) -> Tensor:
        policy, found = models.roles.policy, torch.zeros(mask.shape)
        with torch.no_grad(), generating(policy, merged=merged):
            for chosen, plain in microbatches(table, range(len(mask)), 8):
                found[chosen] = policy(plain, mask[chosen], temperature=1.0)[0]
        return found[mask].double()

    without, plain = logprobs(exact, merged=False), logprobs(low, merged=False)
    rows = []
    for spread in SPREADS:
        changed, total = 0, 0
        for number, name in enumerate(sorted(wide)):
            if "lora_B.policy" not in name:
                continue
            torch.manual_seed(number)
            wide[name].data.normal_(std=spread)
            rounded[name].data.copy_(wide[name].data)
            weight = rounded[name.replace("lora_B.policy", "base_layer")].detach()
            update = LORA_ALPHA / LORA_RANK * wide[name].detach() @ wide[name.replace("lora_B", "lora_A")].detach()
            changed += int(((weight.float() + update).to(weight.dtype) != weight).sum())
            total += weight.numel()
        effect = logprobs(exact, merged=False) - without
        row: dict[str, Any] = {"spread": spread, "changed": changed / total, "effect": float(effect.std())}
        for name, merged in (("apart", False), ("merged", True)):
            found = logprobs(low, merged=merged) - plain
            slope = float((found * effect).sum() / effect.square().sum())
            row[name] = {"kept": slope, "error": float((found - effect).std())}
        rows.append(row)
    return {"noise": float((plain - without).std()), "rows": rows}


def worker() -> None:
    """One size; its options are those of `quartet_worker.py`."""
    from probe import write_result
    from quartet_worker import parse

    options = parse()
    write_result(options.out, work(options))


def main() -> None:
    """Run the sizes; print the table."""
    options = parser(__doc__).parse_args()
    sizes = [
        size
        for size in ("S", "M")
        if any(text in size for text in options.only) and not (options.quick and size == "M")
    ]
    make_models(options, sizes, early=False)
    versions = {"quartet": own_versions()}
    print(heading(versions, options.threads))
    results = {}
    for size in sizes:
        arguments = ["--root", str(options.models / size), "--plan", "paired"]
        found = results[size] = run_worker(sys.executable, "adapter_effect.py", arguments, options.threads)
        print(f"\n{size}: noise of bfloat16 without an adapter {found['noise']:.4f} nats")
        print("| B | weights changed | effect | kept, apart | merged | error, apart | merged |")
        print("|---|---|---|---|---|---|---|")
        for row in found["rows"]:
            apart, merged = row["apart"], row["merged"]
            kept = f"{apart['kept']:.2f} | {merged['kept']:.2f} | {apart['error']:.4f} | {merged['error']:.4f}"
            print(f"| {row['spread']:.0e} | {row['changed']:.0%} | {row['effect']:.4f} | {kept} |", flush=True)
    write_json(options.json, {"machine": machine(), "versions": versions, "threads": options.threads, "sizes": results})


if __name__ == "__main__":
    worker() if "--out" in sys.argv else main()
