"""Rows of each kind of file, and errors that name the line."""

import csv
import json
import struct
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from quartet.errors import DataError
from quartet.run.prompt_files import read_rows, settings_read

BOM = b"\xef\xbb\xbf"


def rows(path: Path | str, column: str = "prompt", split: str = "train") -> list[tuple[str, object]]:
    return [(row.where, row.value) for row in read_rows(str(path), column=column, split=split)]


def values(path: Path | str, **keys: str) -> list[object]:
    return [value for _, value in rows(path, **keys)]


def write(folder: Path, name: str, content: bytes | str) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.fixture
def quiet_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of its own, no network, no bars."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


def test_text_skips_blank_lines_and_keeps_spaces_and_line_numbers(tmp_path: Path) -> None:
    path = write(tmp_path, "p.TXT", BOM + "one \r\n\r\n  \n two\u2028x\nlast".encode())
    assert rows(path) == [
        (f"line 1 of {path}", "one "),
        (f"line 4 of {path}", " two\u2028x"),
        (f"line 5 of {path}", "last"),
    ]


def test_jsonl_with_bom_crlf_and_blank_lines(tmp_path: Path) -> None:
    path = write(tmp_path, "p.jsonl", BOM + b'{"prompt": "a"}\r\n\r\n{"prompt": [1], "other": 2}\r\n')
    assert rows(path) == [(f"line 1 of {path}", "a"), (f"line 3 of {path}", [1])]


def test_json_as_lines_and_as_an_array(tmp_path: Path) -> None:
    assert values(write(tmp_path, "lines.json", '{"q": "a"}\n{"q": "b"}\n'), column="q") == ["a", "b"]
    array = write(tmp_path, "array.json", BOM + b'\n [\n  {"q": "a"},\n  {"q": "b"}\n]\n')
    assert rows(array, column="q") == [(f"item 1 of {array}", "a"), (f"item 2 of {array}", "b")]


def test_csv_quotes_commas_and_line_breaks(tmp_path: Path) -> None:
    path = write(tmp_path, "p.csv", BOM + b'id,prompt\r\n1,"a, b"\r\n\r\n2,"two\r\nlines"\r\n3,\r\n')
    assert rows(path) == [
        (f"line 2 of {path}", "a, b"),
        (f"line 4 of {path}", "two\r\nlines"),
        (f"line 6 of {path}", ""),
    ]


def test_which_settings_a_source_is_read_by(tmp_path: Path) -> None:
    split = datasets.Dataset.from_dict({"prompt": ["a"]})
    split.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": split}).save_to_disk(tmp_path / "several.txt")
    both = {"column", "split"}
    expected = {"one": {"column"}, "several.txt": both, "p.TXT": set(), "p.csv": {"column"}, "p.parquet": {"column"}}
    assert {name: settings_read(str(tmp_path / name)) for name in expected} == expected
    assert settings_read("somebody/prompts") == both


def test_csv_fields_may_be_long_and_the_limit_of_others_stays(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    found = read_rows(
        str(write(tmp_path, "p.csv", f"prompt\n{'x' * (limit + 1)}\na\n")), column="prompt", split="train"
    )
    assert next(found).value == "x" * (limit + 1)
    assert csv.field_size_limit() == limit
    assert [row.value for row in found] == ["a"]


@pytest.mark.usefixtures("quiet_datasets")
@pytest.mark.parametrize("chat", [False, True])
def test_parquet_text_that_is_not_utf8(tmp_path: Path, chat: bool) -> None:
    ends = pyarrow.py_buffer(struct.pack("<4i", 0, 1, 2, 3))
    text = pyarrow.StringArray.from_buffers(3, ends, pyarrow.py_buffer(b"a\xffb"))
    messages = pyarrow.StructArray.from_arrays([pyarrow.array(["user"] * 3), text], ["role", "content"])
    cells = pyarrow.ListArray.from_arrays([0, 1, 2, 3], messages) if chat else text
    path = tmp_path / "p.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": cells}), path)
    with pytest.raises(DataError, match=rf"row 2 of {path} is not UTF-8 \(invalid start byte\); write the file again"):
        rows(path)
    with pytest.raises(DataError, match=rf"a row after row 0 of {tmp_path} is not UTF-8 \(invalid start byte\); write"):
        rows(tmp_path)


def test_parquet_text_and_messages(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hi"}]
    table = pyarrow.table({"other": [1, 2, 3], "prompt": [chat, None, [*chat, *chat]]})
    path = tmp_path / "p.parquet"
    pyarrow.parquet.write_table(table, path, row_group_size=2)
    assert rows(path) == [
        (f"row 1 of {path}", chat),
        (f"row 2 of {path}", None),
        (f"row 3 of {path}", [*chat, *chat]),
    ]


@pytest.mark.usefixtures("quiet_datasets")
def test_folder_that_datasets_can_load(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder, "train.jsonl", '{"prompt": "a"}\n{"prompt": "b"}\n')
    write(folder, "test.jsonl", '{"prompt": "c"}\n')
    assert values(folder) == ["a", "b"]
    assert values(folder, split="test") == ["c"]
    with pytest.raises(DataError, match=r"with split dev .*ValueError.*check data\.split"):
        rows(folder, split="dev")


@pytest.mark.usefixtures("quiet_datasets")
@pytest.mark.parametrize("as_dict", [True, False])
def test_folder_that_datasets_has_saved(tmp_path: Path, as_dict: bool) -> None:
    data = datasets.Dataset.from_dict({"prompt": ["a", "b"]})
    (datasets.DatasetDict(train=data) if as_dict else data).save_to_disk(tmp_path / "set")
    assert values(tmp_path / "set") == ["a", "b"]
    with pytest.raises(DataError, match=r"no column 'text'; set data\.column to one of those it has: 'prompt'"):
        rows(tmp_path / "set", column="text")


@pytest.mark.usefixtures("quiet_datasets")
def test_hub_name_that_cannot_be_loaded() -> None:
    with pytest.raises(
        DataError, match="quartet-test/absent cannot be loaded as a data set with split train"
    ) as caught:
        rows("quartet-test/absent")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["absent.jsonl", "./absent", "/no/such/folder", "~/absent", "a/b/c"])
def test_missing_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        rows(name)


def test_unknown_kind_of_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"file of unknown kind; name it \.txt, \.jsonl"):
        rows(write(tmp_path, "p.xlsx", b"x"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"good\nb\xffd\n", "line 2 of .* is not UTF-8"),
        ("p.txt", "hello\n".encode("utf-16"), "line 1 of .* is not UTF-8"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": \xff}\n', "line 2 of .* is not UTF-8"),
        ("p.jsonl", b'{"prompt": "a"}\n\n{"prompt": "b"\n', "line 3 of .* is not JSON"),
        ("p.jsonl", b"[" * 200_000, "line 1 of .* is not JSON"),
        ("p.jsonl", b'"text"\n', "line 1 of .* is of type str; write an object"),
        ("p.jsonl", b'{"prompt": "a"}\n{"text": "b", "n": 1}\n', "line 2 of .* no column 'prompt'.*: 'text', 'n'$"),
        ("p.json", b'[\n{"prompt": "a"},\n]', "is not JSON .*line 3"),
        ("p.json", b'[{"prompt": "a"}, 3]', "item 2 of .* is of type int"),
        ("p.csv", b"text,n\na,1\n", "no column 'prompt'; .*: 'text', 'n'$"),
        ("p.csv", b"prompt,prompt\na,1\n", "more than one column 'prompt'"),
        ("p.csv", b"", "no column 'prompt'; .*: none$"),
        ("p.csv", b"n,prompt\n1,a\n2,b, c\n", "line 3 of .* has 3 fields where the header has 2"),
        ("p.csv", b"n,prompt\n1,a\n2\n", "line 3 of .* has 1 fields"),
        ("p.csv", b'n,prompt\n1,a\n2,"open\n', "line 3 of .* is not CSV"),
        ("p.parquet", b"PAR1 this is none PAR1", "not a readable Parquet file"),
        ("p.parquet", b"", "not a readable Parquet file"),
    ],
)
def test_unusable_content(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = write(tmp_path, name, content)
    with pytest.raises(DataError, match=message) as caught:
        rows(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_parquet_cut_off_in_its_data(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": [json.dumps(list(range(i))) for i in range(500)]}), path)
    content = bytearray(path.read_bytes())
    content[100 : len(content) // 2] = b"\0" * (len(content) // 2 - 100)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"p\.parquet"):
        rows(path)


def test_parquet_without_the_column(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), path)
    with pytest.raises(DataError, match=r"no column 'prompt'; set data\.column to one of those it has: 'text'$"):
        rows(path)
