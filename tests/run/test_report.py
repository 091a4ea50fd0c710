"""report.html: it stands alone, shows every number and sample, and text of a model stays text."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from quartet.cli import main
from quartet.run.charts import line_chart
from quartet.run.report import render
from quartet.trainer import train

HARM = [
    "<script>document.title='harmed'</script>",
    "</pre></td></table><img src=x onerror=alert(1)>",
    '"><svg onload=alert(1)>',
    "{{ 7 * 7 }}{% raw %}",
    "<!-- ",
    "</style><style>body{display:none}",
    "&lt;b&gt;\u202e\x00\ud7ff",
]
RECORD = {"iteration": 1, "episodes": 4, "kl/reference": 2.0, "reward/score": 0.5, "time/rollout": 3.0}


class Page(HTMLParser):
    """Tags, attributes and the text of every `pre`."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.pre: list[str] = []
        self.comments = 0
        self._inside = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "pre":
            self._inside = True
            self.pre.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = self._inside and tag != "pre"

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.pre[-1] += data

    def handle_comment(self, data: str) -> None:
        self.comments += 1


def sample(iteration: int, prompt: str, response: str) -> dict[str, Any]:
    return {"iteration": iteration, "prompt": prompt, "response": response, "score": 1.0, "kl": 0.25, "tokens": 3}


def test_text_of_a_model_stays_text() -> None:
    samples = [
        sample(i, prompt, response) for i in (0, 5) for prompt, response in zip(HARM, reversed(HARM), strict=True)
    ]
    page = Page(render(HARM[0], [RECORD], samples))
    assert not {"script", "img", "iframe", "object", "link", "a"} & set(page.tags)
    assert page.tags.count("style") == 1
    assert not [name for name, _ in page.attributes if name.startswith("on") or name in ("src", "href")]
    assert page.comments == 0
    assert page.pre[::3] == HARM
    assert page.pre[1::3] == page.pre[2::3] == HARM[::-1]
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="no browser is installed; the test above reads the page with a parser")
def test_text_of_a_model_stays_text_in_a_browser(tmp_path: Path) -> None:
    """The page as the browser holds it after it ran whatever it would run."""
    samples = [sample(i, prompt, response) for i in (0, 5) for prompt, response in zip(HARM, HARM[::-1], strict=True)]
    (tmp_path / "report.html").write_text(render("run", [RECORD], samples), "utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    address = (tmp_path / "report.html").as_uri()
    shown = subprocess.run([str(BROWSER), *options, address], capture_output=True, timeout=120, check=True).stdout
    page = Page(shown.decode())
    assert not {"script", "img", "iframe", "object"} & set(page.tags)
    assert page.tags.count("style") == 1
    assert "harmed" not in shown.decode().partition("</title>")[0]
    assert page.pre[::3][:6] == HARM[:6]


def test_a_few_iterations_stand_side_by_side() -> None:
    samples = [sample(i, f"p{n}", f"r{i}-{n}") for i in range(0, 101, 10) for n in range(2)]
    page = Page(render("run", [RECORD], samples))
    assert page.pre == ["p0", "r0-0", "r30-0", "r70-0", "r100-0", "p1", "r0-1", "r30-1", "r70-1", "r100-1"]


def test_points_lie_where_the_numbers_say() -> None:
    """The frame is 390 wide from 58 and 178 high from 28; the middle value lies in the middle."""
    chart = line_chart("t", {"a": [(0.0, 0.0), (1.0, 5.0), (math.nan, 1.0), (2.0, 10.0), (3.0, math.inf)]}, x_label="x")
    assert 'points="58.0,206.0 253.0,117.0 448.0,28.0"' in chart
    for tick in ("0", "2", "4", "6", "8", "10"):
        assert f">{tick}</text>" in chart


@pytest.mark.parametrize("values", [[], [math.nan], [0.0], [5.0, 5.0], [1e-300], [1e300, -1e300], [1e9, 1e9 + 1]])
def test_odd_series_are_drawn(values: list[float]) -> None:
    chart = line_chart("<t>", {"<a>": list(enumerate(values)), "b": []}, x_label="<x>")
    assert "<t>" not in chart
    assert "nan" not in chart
    assert "inf" not in chart
    assert ("no values" in chart) == (not any(math.isfinite(value) for value in values))


def test_the_command(tiny_run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(tiny_run(**{"ppo.iterations": 2, "data.eval_count": 2}))
    capsys.readouterr()
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    page = Page((run / "report.html").read_text("utf-8"))
    assert page.tags.count("svg") == 11
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text("utf-8").splitlines()]
    assert set(page.pre) == {text for s in samples for text in (s["prompt"], s["response"])}


def test_where_no_report_can_be(tiny_run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err
    run = train(tiny_run(**{"data.eval_count": 1}))
    samples = (run / "samples.jsonl").read_text()
    (run / "samples.jsonl").write_text(samples + samples[:20])  # as a killed run leaves it
    assert main(["report", str(run)]) == 0
    (run / "samples.jsonl").write_text("{\n")
    capsys.readouterr()
    assert main(["report", str(run)]) == 2
    assert "line 1 of" in capsys.readouterr().err
    (run / "metrics.jsonl").write_text("")
    assert main(["report", str(run)]) == 2
    assert "has no iteration yet" in capsys.readouterr().err
