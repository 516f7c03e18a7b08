"""Files of examples -> rows with the place they came from; what cannot be read is reported by line number."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zplan.errors import ConfigError

MAX_LINE_BYTES = 8 << 20
"""Far beyond any context window (about two million tokens); a longer line is a broken file."""
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")

_OTHER_SPLIT = re.compile(r"(^|[^a-z])(test|testing|eval|evaluation|valid|validation|val|dev)([^a-z]|$)")
"""Words in file names by which `datasets` tells splits apart (datasets 5.2, data_files.py, SPLIT_KEYWORDS)."""


@dataclass(frozen=True, slots=True)
class Row:
    """One example as the file holds it."""

    where: str
    """`train.jsonl:17`."""
    value: dict[str, Any]


@dataclass(frozen=True, slots=True)
class BadRow:
    """One place that holds no usable example."""

    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


def read_rows(source: str, *, streaming: bool = False) -> Iterator[Row | BadRow]:
    """Rows of a file, a folder of files, a saved `datasets` folder or a Hub id, in order.

    Args:
        streaming: a Hub id is read while it is downloaded.

    Raises:
        ConfigError: nothing there, an unknown kind of file, or one that cannot be read at all.
    """
    path = Path(source).expanduser()
    try:
        if path.is_dir():
            yield from _read_folder(path)
        elif path.exists():
            yield from _read_file(path)
        else:
            yield from _read_hub(source, streaming=streaming)
    except OSError as error:
        raise ConfigError(f"{source} cannot be read: {error.strerror or error}", fix="check --dataset") from error


def _read_folder(path: Path) -> Iterator[Row | BadRow]:
    if (path / "dataset_dict.json").is_file():
        if not (path / "train" / "state.json").is_file():
            raise ConfigError(f"{path} has no split called train", fix=f"--dataset {path}/SPLIT")
        path = path / "train"
    if (path / "dataset_info.json").is_file() and (path / "state.json").is_file():
        import datasets

        for index, value in enumerate(datasets.load_from_disk(str(path))):
            yield Row(f"{path.name}[{index}]", dict(value))
        return
    for item in _data_files(path):
        yield from _read_file(item)


def _data_files(path: Path) -> list[Path]:
    """Every data file below, in the order of the names.

    Raises:
        ConfigError: none, or files for testing among those for training, which must not be trained on unnoticed.
    """
    files = sorted(item for item in path.rglob("*") if item.suffix.lower() in SUFFIXES and item.is_file())
    if not files:
        raise ConfigError(
            f"{path} holds no data file", because=f"known are {', '.join(SUFFIXES)}", fix="--dataset FILE.jsonl"
        )
    other = [item for item in files if _OTHER_SPLIT.search(str(item.relative_to(path)).lower())]
    if other and len(other) < len(files):
        raise ConfigError(
            f"{path} holds more than one split: {other[0].relative_to(path)} looks like none to train on",
            because="every file of a folder is trained on",
            fix=f"--dataset {next(item for item in files if item not in other)}",
        )
    return files


def _read_file(path: Path) -> Iterator[Row | BadRow]:
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        return _read_jsonl(path)
    if suffix == ".json":
        return _read_json(path)
    if suffix in (".csv", ".tsv"):
        return _read_csv(path, delimiter="\t" if suffix == ".tsv" else ",")
    if suffix == ".parquet":
        return _read_parquet(path)
    raise ConfigError(
        f"{path} has the suffix {suffix or '(none)'}",
        because=f"known are {', '.join(SUFFIXES)}",
        fix=f"gunzip {path.name}" if suffix == ".gz" else "rename it to .jsonl if it holds one JSON object per line",
    )


def _read_jsonl(path: Path) -> Iterator[Row | BadRow]:
    with path.open("rb") as stream:
        for number, line in enumerate(_bounded_lines(stream), start=1):
            where = f"{path.name}:{number}"
            if isinstance(line, int):
                yield BadRow(where, f"{line} bytes in one line, more than {MAX_LINE_BYTES}")
            elif line.strip():
                yield _parse_line(line, where)


def _bounded_lines(stream: Any) -> Iterator[bytes | int]:
    """Lines without their end; only the length of one that is longer than MAX_LINE_BYTES."""
    while line := stream.readline(MAX_LINE_BYTES + 1):
        if len(line) <= MAX_LINE_BYTES or line.endswith(b"\n"):
            yield line
            continue
        length = len(line)
        while not line.endswith(b"\n") and (line := stream.readline(MAX_LINE_BYTES)):
            length += len(line)
        yield length


def _parse_line(line: bytes, where: str) -> Row | BadRow:
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return BadRow(where, f"not UTF-8 (byte {error.start} of the line is 0x{line[error.start]:02x})")
    except (ValueError, RecursionError) as error:  # ValueError: also a number of more than 4300 digits
        return BadRow(where, f"not JSON: {error}")
    return _row(value, where)


def _row(value: Any, where: str) -> Row | BadRow:
    if not isinstance(value, dict):
        return BadRow(where, f"a JSON object is needed, not {type(value).__name__}")
    return Row(where, value)


def _read_json(path: Path) -> Iterator[Row | BadRow]:
    """A list of objects, an object with one list in it, or in truth one object per line."""
    content = path.read_bytes()
    try:
        data = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not UTF-8 (byte {error.start})", fix=f"iconv -f latin1 -t utf-8 {path.name}"
        ) from error
    except (json.JSONDecodeError, RecursionError) as error:
        if content.lstrip().startswith(b"{") and b"\n" in content.strip():
            yield from _read_jsonl(path)
            return
        raise ConfigError(f"{path} is not JSON: {error}", fix=f"python -m json.tool {path}") from error
    if isinstance(data, dict):
        lists = [value for value in data.values() if isinstance(value, list)]
        data = lists[0] if len(lists) == 1 and not _looks_like_a_row(data) else [data]
    for index, value in enumerate(data if isinstance(data, list) else [data]):
        yield _row(value, f"{path.name}[{index}]")


def _looks_like_a_row(data: dict[str, Any]) -> bool:
    return bool({"messages", "conversations"} & data.keys())


def _read_csv(path: Path, *, delimiter: str) -> Iterator[Row | BadRow]:
    csv.field_size_limit(MAX_LINE_BYTES)
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream, delimiter=delimiter, strict=True)
        try:
            for value in reader:
                where = f"{path.name}:{reader.line_num}"
                if None in value or None in value.values():
                    yield BadRow(where, f"{len(reader.fieldnames or ())} columns in the header, another number here")
                else:
                    yield Row(where, dict(value))
        except (csv.Error, UnicodeDecodeError) as error:
            raise ConfigError(
                f"{path} cannot be read after line {reader.line_num}: {error}", fix="save it as UTF-8 CSV with quotes"
            ) from error


def _read_parquet(path: Path) -> Iterator[Row | BadRow]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        table = pyarrow.parquet.ParquetFile(path)
        index = 0
        for batch in table.iter_batches(batch_size=1024):
            for value in batch.to_pylist():
                yield Row(f"{path.name}[{index}]", value)
                index += 1
    except pyarrow.ArrowException as error:
        raise ConfigError(f"{path} is not a readable Parquet file: {error}", fix="write it again") from error


def is_hub_id(source: str) -> bool:
    """True for `owner/name` that is no path here."""
    return (
        source.count("/") == 1
        and not source.startswith((".", "/", "~"))
        and not source.lower().endswith(SUFFIXES)
        and not Path(source).exists()
    )


def _read_hub(source: str, *, streaming: bool) -> Iterator[Row | BadRow]:
    import datasets

    if not is_hub_id(source):
        raise ConfigError(f"{source} does not exist", because="it is no file, folder or Hub id", fix="check --dataset")
    try:
        table = datasets.load_dataset(source, split="train", streaming=streaming)
    except Exception as error:  # the process boundary to a remote service: every kind of failure means "not there"
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            f"{source} is no file here and cannot be loaded from the Hub: {first}", fix="--dataset FILE.jsonl"
        ) from error
    for index, value in enumerate(table):
        yield Row(f"{source}[{index}]", dict(value))
