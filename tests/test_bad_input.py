"""Any mutation of a valid input either gets as far as loading weights or ends in exit 2 with one sentence.

Never a traceback, a hang, or a file that changed. Drawn by hypothesis, the same way each time.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quartet.cli import main
from quartet.config.load import known_keys
from quartet.errors import QuartetError
from quartet.run.data import load_prompts
from quartet.run.prompt_files import read_rows
from tiny import changed

REACHED = "far enough"
FEW = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
Run = Callable[..., str]
TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def damage(draw: st.DrawFn, content: bytes) -> bytes:
    """The content with a few bytes cut out, overwritten or put in."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(data)))
        length = draw(st.sampled_from([0, 1, 1, 2, 7, 200]))
        data[place : place + length] = draw(st.binary(max_size=4))
    return bytes(data)


@pytest.fixture
def run(tiny_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """run(config text or values): the sentence that `quartet train` ends with. What lies beyond the inputs is left out: to
    predict the memory and to load the weights."""

    def stop(*_: Any) -> None:
        raise QuartetError(REACHED)

    monkeypatch.setattr("quartet.run.session.account_for", stop)
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "run.yaml"

    def go(given: bytes | dict[str, Any], *overrides: str) -> str:
        config.write_bytes(given if isinstance(given, bytes) else yaml.safe_dump(given).encode())
        before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in tmp_path.rglob("*")}
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(["train", str(config), *overrides])
        assert {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in tmp_path.rglob("*")} == before
        said = err.getvalue()
        assert code == 2
        assert said.startswith("quartet: ")
        assert said.count("\n") == 1, said
        assert len(said) < 1500, said
        return said

    yield go
    assert REACHED in go(tiny_run())


@pytest.fixture
def valid(tiny_run: Any) -> dict[str, Any]:
    return tiny_run()


class TestConfiguration:
    def test_damaged_text(self, run: Run, valid: dict[str, Any]) -> None:
        content = yaml.safe_dump(valid).encode()

        @FEW
        @given(damage(content))
        def check(mutated: bytes) -> None:
            run(mutated)

        check()

    def test_any_value_for_any_key(self, run: Run, valid: dict[str, Any]) -> None:
        @FEW
        @given(st.sampled_from(sorted(known_keys())), JSON)
        def check(key: str, value: Any) -> None:
            if key == "run.dir" and isinstance(value, str):
                return
            try:
                content = yaml.safe_dump(changed(valid, {key: value})).encode()
            except (yaml.YAMLError, TypeError, AttributeError):
                return  # cannot be written down
            run(content)

        check()

    def test_any_override(self, run: Run, valid: dict[str, Any]) -> None:
        @FEW
        @given(
            st.sampled_from([*sorted(known_keys()), "", "a.b", "models[0]"]),
            TEXT | st.sampled_from(["${", "${a}", "[1"]),
        )
        def check(key: str, value: str) -> None:
            if key != "run.dir":
                run(valid, f"{key}={value}")

        check()

    @pytest.mark.parametrize(
        "text",
        [
            "run: {seed: 1}\nrun: {seed: 2}\n",  # a key twice
            "models: &a {sft: *a}\n",
            "[" * 5000,
            "a: " + "{a: " * 3000,
            "when: 2026-13-45\n",
            "a: !!python/name:os.system\n",
            "a: !!binary x\n",
            "? [1, 2]\n: 3\n",
            "1: 2\n",
            "\ufeffmodels: 3\n",
            "models:\r\n  sft: 3\r\n",
            "a: ${oc.env:NOT_SET_ANYWHERE}\n",
            "a: ${a}\n",
            "\x00",
            "ppo: {kl_coef: 1e999}\n",
            "ppo: {iterations: " + "9" * 5000 + "}\n",
        ],
        ids=range(16),
    )
    def test_odd_yaml(self, text: str, run: Run) -> None:
        assert REACHED not in run(text.encode())

    def test_a_key_given_twice_is_named(self, run: Run, valid: dict[str, Any]) -> None:
        said = run(yaml.safe_dump(valid).encode() + b"ppo: {epochs: 1}\n")
        assert "is not readable as YAML: " in said
        assert "duplicate key ppo in line" in said

    @pytest.mark.parametrize("key", ["models.sft", "models.reward", "data.prompts", "data.eval_prompts", "run.dir"])
    @pytest.mark.parametrize(
        "value", ["\x00", "a" * 5000, "\ud800", "..", ".", "/", "~nobody/x", "a/b", " ", "\U0010ffff"]
    )
    def test_odd_paths(self, key: str, value: str, run: Run, valid: dict[str, Any]) -> None:
        run(json.dumps(changed(valid, {"data.eval_count": 1, key: value})).encode())

    def test_a_long_value_is_cut(self, run: Run, valid: dict[str, Any]) -> None:
        assert REACHED not in run(changed(valid, {"ppo.clip": "x" * 100_000}))


def written(tmp_path: Path, name: str, content: bytes) -> str:
    (tmp_path / name).write_bytes(content)
    return str(tmp_path / name)


ROWS = [{"prompt": text} for text in ("to be", "why?", "one two", "日本", "🙂", "x-y")]
CHAT = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "why?"}]


def parquet(rows: list[dict[str, Any]]) -> bytes:
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), stream)
    return stream.getvalue()


FILES = {
    "p.txt": "\n".join(row["prompt"] for row in ROWS).encode(),
    "p.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS).encode(),
    "p.json": json.dumps(ROWS).encode(),
    "p.csv": ("prompt,n\n" + "".join(f'"{row["prompt"]}",1\n' for row in ROWS)).encode(),
    "p.parquet": parquet(ROWS),
}


class TestPrompts:
    @pytest.mark.parametrize("name", FILES)
    def test_damaged_files(self, name: str, run: Run, valid: dict[str, Any], tmp_path: Path) -> None:
        @FEW
        @given(damage(FILES[name]))
        def check(mutated: bytes) -> None:
            run(changed(valid, {"data.prompts": written(tmp_path, name, mutated)}))

        check()

    def test_any_json_as_a_prompt(self, run: Run, valid: dict[str, Any], tmp_path: Path) -> None:
        message = st.fixed_dictionaries({"role": JSON | st.just("user"), "content": JSON}) | JSON

        @FEW
        @given(st.lists(message, max_size=3) | JSON)
        def check(value: Any) -> None:
            content = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in ("a", value, CHAT))
            run(changed(valid, {"data.prompts": written(tmp_path, "p.jsonl", content.encode("utf-8", "replace"))}))

        check()

    @pytest.mark.parametrize("name", ["p.txt", "p.jsonl", "p.csv", "p.parquet"])
    def test_unicode_of_every_plane_comes_through(self, name: str, tmp_path: Path) -> None:
        """One character of every 4,096 and the edges of every plane, surrogates aside; no line ends, which end a prompt."""
        points = {p for plane in range(17) for p in (plane << 16, (plane << 16) + 0xFFFF)} | set(
            range(0x21, 0x110000, 0x1000)
        )
        texts = [f"a{chr(p)}b" for p in sorted(points) if p and not 0xD800 <= p <= 0xDFFF]
        file = tmp_path / name
        if name == "p.txt":
            file.write_text("\r\n".join(texts), "utf-8-sig", newline="")
        elif name == "p.jsonl":
            file.write_text("".join(json.dumps({"prompt": t}, ensure_ascii=False) + "\r\n" for t in texts), "utf-8-sig")
        elif name == "p.csv":
            file.write_text("prompt\r\n" + "".join(f'"{text}"\r\n' for text in texts), "utf-8-sig", newline="")
        else:
            file.write_bytes(parquet([{"prompt": text} for text in texts]))
        assert [row.value for row in read_rows(str(file), column="prompt", split="train")] == texts

    def test_a_prompt_of_ten_megabytes_is_left_out(self, run: Run, valid: dict[str, Any], tmp_path: Path) -> None:
        content = b"why?\n" + b"ab " * 3_500_000 + b"\nto be\n"
        assert REACHED in run(changed(valid, {"data.prompts": written(tmp_path, "p.txt", content)}))
        content = json.dumps({"prompt": "x" * 10_000_000}).encode() + b"\n"
        assert "1 are over data.max_prompt_tokens" in run(
            changed(valid, {"data.prompts": written(tmp_path, "p.jsonl", content)})
        )

    @pytest.mark.parametrize(
        "text", ["", "\n\n\n", "   \n", "\ufeff", "\ufeff\n", '{"prompt": ""}\n', '{"prompt": " "}\n']
    )
    def test_nothing_but_emptiness(self, text: str, run: Run, valid: dict[str, Any], tmp_path: Path) -> None:
        for name in ("p.txt", "p.jsonl"):
            if name == "p.jsonl" or not text.startswith("{"):
                path = written(tmp_path, name, text.encode())
                assert REACHED not in run(changed(valid, {"data.prompts": path}))

    def test_a_key_twice(self, tmp_path: Path) -> None:
        """As every JSON reader of Python does, the last one counts."""
        path = written(tmp_path, "p.jsonl", b'{"prompt": "a", "prompt": "b"}\n')
        assert [row.value for row in read_rows(path, column="prompt", split="train")] == ["b"]

    @pytest.mark.parametrize("name", ["p.jsonl", "p.parquet"])
    def test_a_million_rows_are_streamed(self, name: str, tmp_path: Path) -> None:
        """Reading them takes no more memory than reading a few."""
        file = tmp_path / name
        if name == "p.jsonl":
            with file.open("w") as stream:
                for _ in range(1000):
                    stream.write('{"prompt": "one prompt of a million, each like the one before"}\n' * 1000)
        else:
            texts = [f"prompt number {number} of a million, each like the one before" for number in range(50_000)]
            table = pyarrow.table({"prompt": texts})
            with pyarrow.parquet.ParquetWriter(file, table.schema) as writer:
                for _ in range(20):
                    writer.write_table(table)
            del table, texts
        done = subprocess.run([sys.executable, "-c", READ, str(file)], capture_output=True, text=True, check=True)
        rows, grown = map(int, done.stdout.split())
        assert rows == 1_000_000
        assert grown < 16 << 20


READ = """
import sys
from pathlib import Path
from quartet.run.prompt_files import read_rows

def status_bytes(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

rows = read_rows(sys.argv[1], column="prompt", split="train")
for _ in range(1000):
    next(rows)
Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
before = status_bytes("VmRSS")
print(1000 + sum(1 for _ in rows), status_bytes("VmHWM") - before)
"""
"""In a process of its own: what the allocators of a process that did other things keep is not what reading takes."""


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "config.json", "model.safetensors"])
def test_damaged_checkpoints(file: str, run: Run, valid: dict[str, Any], library: Any, tmp_path: Path) -> None:
    """Of a weights file the header is mutated: Quartet reads no more before it loads."""
    folder = shutil.copytree(library.path("llama", "sft"), tmp_path / "copy")
    content = (folder / file).read_bytes()
    head = content[:1500] if file == "model.safetensors" else content

    @settings(FEW, max_examples=40)
    @given(damage(head))
    def check(mutated: bytes) -> None:
        (folder / file).write_bytes(mutated + content[len(head) :])
        run(changed(valid, {"models.sft": str(folder)}))

    check()


def test_prompts_mutated_reach_the_tokenizer(library: Any) -> None:
    """What the files give is tokenized as it is: no text is changed on the way."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(library.path("llama", "sft"))

    @settings(FEW, max_examples=30)
    @given(st.lists(TEXT.filter(str.strip), min_size=1, max_size=4))
    def check(texts: list[str]) -> None:
        import tempfile

        with tempfile.NamedTemporaryFile("w", suffix=".jsonl", encoding="utf-8") as file:
            file.write("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
            file.flush()
            prompts = load_prompts(
                file.name,
                column="prompt",
                split="train",
                tokenizer=tokenizer,
                max_prompt_tokens=99,
                warn=lambda _: None,
            )
        assert [prompts.text(i) for i in range(len(prompts))] == texts
        for i, text in enumerate(texts):
            assert tokenizer.decode(prompts.tokens(i)) == text

    check()
