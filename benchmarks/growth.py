"""How time and memory of Quartet's iteration (one epoch) grow with episodes and with response tokens, at size S."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from harness import heading, machine, make_models, own_versions, run_worker, write_json
from iteration_table import seconds_of

EPISODES, TOKENS = (8, 16, 32, 64, 128), (32, 64, 128, 256, 512)
FIXED_EPISODES, FIXED_TOKENS = 32, 64


def run_growth(options: argparse.Namespace) -> None:
    """Full fine-tuning in float32, responses to the limit; a table, the raw figures and the plot."""
    pyplot = _pyplot()
    make_models(options, ["S"], early=False)
    versions = {"quartet": own_versions()}
    print(heading(versions, options.threads))
    figures: dict[str, Any] = {"machine": machine(), "versions": versions, "threads": options.threads}
    few = slice(0, 3) if options.quick else slice(None)
    figures["episodes"] = [measure(options, count, FIXED_TOKENS) for count in EPISODES[few]]
    figures["response tokens"] = [measure(options, FIXED_EPISODES, count) for count in TOKENS[few]]
    for name in ("episodes", "response tokens"):
        print(f"\n{name:>16}{'tokens':>9}{'seconds':>9}{'ms/token':>10}{'peak MiB':>10}")
        for row in figures[name]:
            each = 1000 * row["seconds"] / row["tokens"]
            print(f"{row[name]:16}{row['tokens']:9}{row['seconds']:9.2f}{each:10.3f}{row['resident'] / 2**20:10.0f}")
    write_json(options.json, figures)
    plot(pyplot, figures, options.growth)


def measure(options: argparse.Namespace, episodes: int, response: int) -> dict[str, Any]:
    """The second of two iterations."""
    arguments = ["--root", str(options.models / "S"), "--plan", "separate", "--dtype", "float32"]
    arguments += ["--episodes", str(episodes), "--response-length", str(response), "--iterations", "2"]
    arguments += ["--epochs", "1"]
    raw = run_worker(sys.executable, "quartet_worker.py", arguments, options.threads)
    last = raw["iterations"][-1]
    return {
        "episodes": episodes,
        "response tokens": response,
        "tokens": last["prompt_tokens"] + last["response_tokens"],
        "seconds": seconds_of(last),
        "resident": max(p["resident"] for turn in raw["iterations"] for p in turn["phases"].values()),
        "phases": last["phases"],
    }


def plot(pyplot: Any, figures: dict[str, Any], image: Path) -> None:
    """Two panels, seconds and memory in each."""
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for panel, name in zip(panels, ("episodes", "response tokens"), strict=True):
        count = [row[name] for row in figures[name]]
        fixed = f"{FIXED_TOKENS} response tokens" if name == "episodes" else f"{FIXED_EPISODES} episodes"
        panel.plot(count, [row["seconds"] for row in figures[name]], "o-", color="tab:blue")
        panel.set(xlabel=f"{name} ({fixed})", ylabel="seconds an iteration", xlim=(0, None), ylim=(0, None))
        panel.yaxis.label.set_color("tab:blue")
        memory = panel.twinx()
        memory.plot(count, [row["resident"] / 2**20 for row in figures[name]], "s--", color="tab:orange")
        memory.set(ylabel="peak memory over imports, MiB", ylim=(0, None))
        memory.yaxis.label.set_color("tab:orange")
    image.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(image)
    print(f"\n{image}")


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("--growth needs matplotlib, which is not installed; pip install quartet-rlhf[bench]") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
