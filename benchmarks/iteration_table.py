"""The table of the iteration benchmark: medians by case and side, beside the peer and the floor."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

from floor import Shape, Work, floors

STAGES = ("rollout", "scoring", "update")


def seconds_of(iteration: dict[str, Any]) -> float:
    """Wall seconds of one iteration, whatever lies between its stages included."""
    return float(sum(phase["wall"] for phase in iteration["phases"].values()))


def medians(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the counted iterations of one case and side."""
    turns = [turn for row in rows for turn in row["counted"]]
    found: dict[str, Any] = {"counted": len(turns), "seconds": median(seconds_of(turn) for turn in turns)}
    for stage in STAGES:
        for kind in ("wall", "cpu"):
            found[f"{stage} {kind}"] = median(turn["phases"][stage][kind] for turn in turns)
    # The peak may have come in an iteration that does not count, while the optimizer's state was made.
    found["resident"] = max(
        phase["resident"] for row in rows for turn in row["raw"]["iterations"] for phase in turn["phases"].values()
    )
    for kind in ("prompt_tokens", "response_tokens"):
        found[kind] = median(turn[kind] for turn in turns)
    found["decode_steps"] = median(turn.get("decode_steps", 0) for turn in turns)
    found["dtype"] = rows[0]["raw"].get("dtype", "float32")
    return found


def floor_of(found: dict[str, Any], decode_steps: float, setting: dict[str, Any], models: Path) -> dict[str, float]:
    """Seconds of each stage at the least, for the tokens of this case and side."""
    work = Work(
        setting["episodes"],
        int(found["prompt_tokens"]),
        int(found["response_tokens"]),
        int(decode_steps),
        setting["epochs"],
    )
    return floors(Shape.of(models / "policy"), work, setting["rates"], found["dtype"], lora=setting["lora"])


def print_case(name: str, rows: list[dict[str, Any]], setting: dict[str, Any], models: Path) -> dict[str, Any]:
    """One block of the table; returns its medians.

    Args:
        rows: all sides of one case.
        setting: episodes, epochs, rates, lora.
        models: folder of the size's checkpoints.
    """
    sides = {side: medians([r for r in rows if r["side"] == side]) for side in dict.fromkeys(r["side"] for r in rows)}
    steps = max(found["decode_steps"] for found in sides.values())
    peer = sides.get("TRL")
    print(f"\n{name} (iterations counted: {', '.join(str(f['counted']) for f in sides.values())})")
    stages = "".join(f"{stage + ' s (CPU)':>18}" for stage in STAGES)
    print(
        f"{'':18}{'seconds':>9}{'/ TRL':>7}{stages}{'peak MiB':>10}{'tokens/s':>10}{'floor s':>9}{'share':>7}{'update':>8}"
    )
    for side, found in sides.items():
        least = floor_of(found, steps, setting, models)
        found["floor"] = least
        ratio = f"{found['seconds'] / peer['seconds']:7.2f}" if peer else f"{'':7}"
        cells = "".join(f"{found[f'{s} wall']:10.2f} ({found[f'{s} cpu']:5.1f})" for s in STAGES)
        speed = found["response_tokens"] / found["seconds"]
        total = sum(least.values())
        print(
            f"{side:18}{found['seconds']:9.2f}{ratio}{cells}{found['resident'] / 2**20:10.0f}{speed:10.1f}"
            f"{total:9.2f}{total / found['seconds']:7.0%}{least['update'] / found['update wall']:8.0%}"
        )
    return sides
