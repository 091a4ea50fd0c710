"""Reads the prompt column of a file or data set row by row, and says exactly where something is wrong.

Local text, JSON, CSV and Parquet files are read here rather than through `datasets`, whose errors name no line.
"""

from __future__ import annotations

import codecs
import csv
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quartet.errors import DataError, brief, cause_of

if TYPE_CHECKING:
    from datasets import Dataset
    from pyarrow import Array


_BUFFER = 1 << 20
"""Bytes of a Parquet column read at once; without a size Arrow reads the column of a whole row group, which may be the file."""

_SPLITS = "dataset_dict.json"


@dataclass(frozen=True, slots=True)
class Row:
    """One cell of the prompt column, not yet checked."""

    where: str
    """Place for error messages, such as `line 3 of prompts.jsonl`; lines and rows are counted from 1."""
    value: object


def settings_read(source: str) -> frozenset[str]:
    """Which of `column` and `split` `read_rows` makes use of for this source."""
    path = Path(source).expanduser()
    if path.is_dir():
        return frozenset({"column"} if _is_one_split(path) else {"column", "split"})
    reader = _READERS.get(path.suffix.lower())
    return frozenset({"column", "split"} if reader is None else {"column"} if reader is not _text_rows else ())


def read_rows(source: str, *, column: str, split: str) -> Iterator[Row]:
    """The cells of `column` in order.

    `source` is a `.txt` file (a prompt a line, blank lines skipped; `column` is not used), a `.jsonl`, `.json` (lines
    or one array), `.csv` or `.parquet` file, a folder that `datasets` can load or has saved, or a data set's Hub name.
    `split` is used for the last two, but not for a folder that holds one saved split. Text is UTF-8, with or without a byte
    order mark, with LF or CRLF.

    Raises DataError for a source that is missing or unreadable, and for a column that is not there.
    """
    path = Path(source).expanduser()
    reader = _READERS.get(path.suffix.lower())
    if path.is_dir():
        yield from _dataset_rows(str(path), column, split)
    elif path.is_file():
        if reader is None:
            raise DataError(f"{source} is a file of unknown kind; name it {', '.join(_READERS)} after what it holds")
        try:
            yield from reader(path, column)
        except OSError as error:
            raise DataError(f"{source} cannot be read ({cause_of(error)}); check the file") from error
    elif reader is not None or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise DataError(f"{source} does not exist; data.prompts and data.eval_prompts take a file or a data set's name")
    else:
        yield from _dataset_rows(source, column, split)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines with their line ends; only LF ends a line, because JSON and text may hold U+2028 and the like."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            yield number, _decoded(raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw, number, path)


def _decoded(raw: bytes, number: int, path: Path) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"line {number} of {path} is not UTF-8 ({error.reason}); save the file as UTF-8") from error


def _text_rows(path: Path, column: str) -> Iterator[Row]:
    for number, line in _lines(path):
        if line.strip():
            yield Row(f"line {number} of {path}", line.rstrip("\r\n"))


def _jsonl_rows(path: Path, column: str) -> Iterator[Row]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        where = f"line {number} of {path}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where} is not JSON ({brief(error)}); write one JSON object a line") from error
        yield _json_row(record, column, where)


def _json_rows(path: Path, column: str) -> Iterator[Row]:
    """A `.json` file holds lines like `.jsonl`, or one array of objects."""
    first = next((line for _, line in _lines(path) if line.strip()), "")
    if not first.lstrip().startswith("["):
        yield from _jsonl_rows(path, column)
        return
    try:
        records = json.loads("".join(line for _, line in _lines(path)))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({brief(error)}); write one JSON object a line, or one array") from error
    for number, record in enumerate(records, start=1):
        yield _json_row(record, column, f"item {number} of {path}")


def _json_row(record: object, column: str, where: str) -> Row:
    if not isinstance(record, dict):
        raise DataError(f"{where} is of type {type(record).__name__}; write an object such as {{{column!r}: ...}}")
    _check_column(column, list(record), where)
    return Row(where, record[column])


def _csv_rows(path: Path, column: str) -> Iterator[Row]:
    reader = csv.reader((line for _, line in _lines(path)), strict=True)
    try:
        header = _csv_record(reader) or []
        _check_column(column, header, str(path))
        index = header.index(column)
        while True:
            # A quoted field may span lines: the record starts one line after the last one ended.
            number = reader.line_num + 1
            fields = _csv_record(reader)
            if fields is None:
                return
            if not fields:
                continue
            where = f"line {number} of {path}"
            if len(fields) != len(header):
                raise DataError(
                    f"{where} has {len(fields)} fields where the header has {len(header)}; "
                    "put text that holds commas between double quotes"
                )
            yield Row(where, fields[index])
    except csv.Error as error:
        raise DataError(f"line {reader.line_num} of {path} is not CSV ({brief(error)}); check its quotes") from error


def _csv_record(reader: Iterator[list[str]]) -> list[str] | None:
    """The next record, its fields as long as they may be; the limit is everybody's, so that it is raised for no longer."""
    limit = csv.field_size_limit(sys.maxsize)
    try:
        return next(reader, None)
    finally:
        csv.field_size_limit(limit)


def _parquet_rows(path: Path, column: str) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False) as file:
            _check_column(column, file.schema_arrow.names, str(path))
            number = 0
            for batch in file.iter_batches(batch_size=1024, columns=[column], use_threads=False):
                for value in _parquet_values(batch.column(column), number, path):
                    number += 1
                    yield Row(f"row {number} of {path}", value)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is not a readable Parquet file ({brief(error)}); write it again") from error


def _parquet_values(cells: Array, before: int, path: Path) -> list[object]:
    """The values of a part of the column that has `before` rows before it."""
    try:
        values: list[object] = cells.to_pylist()
        return values
    except UnicodeDecodeError:
        for number, cell in enumerate(cells, start=before + 1):
            try:
                cell.as_py()
            except UnicodeDecodeError as error:
                raise DataError(
                    f"row {number} of {path} is not UTF-8 ({error.reason}); write the file again with text in UTF-8"
                ) from error
        raise


def _dataset_rows(source: str, column: str, split: str) -> Iterator[Row]:
    data = _load_dataset(source, split)
    _check_column(column, data.column_names, f"split {split} of {source}")
    number = 0
    try:
        for batch in data.select_columns([column]).iter(batch_size=1024):
            for value in batch[column]:
                number += 1
                yield Row(f"row {number} of {source}", value)
    except UnicodeDecodeError as error:
        raise DataError(
            f"a row after row {number} of {source} is not UTF-8 ({error.reason}); write it again with text in UTF-8"
        ) from error


def _load_dataset(source: str, split: str) -> Dataset:
    import datasets

    folder, bars = Path(source), datasets.is_progress_bar_enabled()
    datasets.disable_progress_bar()
    try:
        if (folder / _SPLITS).is_file():
            return datasets.load_from_disk(source)[split]
        if _is_one_split(folder):
            return datasets.load_from_disk(source)
        return datasets.load_dataset(source, split=split)
    except Exception as error:
        # datasets documents no common base of what it raises for a bad name, split, network or file.
        raise DataError(
            f"{source} cannot be loaded as a data set with split {split} ({type(error).__name__}: "
            f"{brief(error)}); check data.split, the name and the network, or give a local file"
        ) from error
    finally:
        if bars:
            datasets.enable_progress_bar()


def _is_one_split(folder: Path) -> bool:
    """Whether `datasets` saved a data set there, and not several splits by name."""
    return (folder / "state.json").is_file() and not (folder / _SPLITS).is_file()


def _check_column(column: str, columns: Sequence[str], where: str) -> None:
    if list(columns).count(column) != 1:
        problem = "more than one column" if column in columns else "no column"
        names = ", ".join(repr(str(name)) for name in columns) or "none"
        raise DataError(f"{where} has {problem} {column!r}; set data.column to one of those it has: {names}")


_READERS: dict[str, Callable[[Path, str], Iterator[Row]]] = {
    ".txt": _text_rows,
    ".jsonl": _jsonl_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
}
