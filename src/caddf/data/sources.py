"""Documents from files, folders, data sets by name, and the standard library's sources.

What a file is, its suffix says: JSON lines (`.jsonl`, `.ndjson`, `.json`), parquet (`.parquet`), else text; `.gz`,
`.xz` and `.zst` on top are compression. A text file is one document, or several if lines that hold `<|endoftext|>`
alone stand between them. A folder is all its files, in order of their paths; hidden ones do not count.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import itertools
import json
import lzma
import os
import re
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from caddf.errors import InputError
from caddf.tokenizer import check_unicode

_SEPARATOR = re.compile(r"^<\|endoftext\|>(?:\r?\n|\Z)", re.MULTILINE)
_PARAGRAPH = re.compile(r".+?(?:\n\s*\n|\Z)", re.DOTALL)
_JSON_LINES = {".jsonl", ".ndjson", ".json"}
_COMPRESSED = {".gz", ".xz", ".zst"}
# Installed packages, tests, files that are broken on purpose, and tables made by programs.
_NOT_WRITTEN_TO_BE_READ = set("site-packages dist-packages test tests idle_test lib2to3 encodings pydoc_data".split())


@dataclass(frozen=True)
class Source:
    """Documents, read anew whenever it is iterated; blank ones are left out.

    `spec` is a path, `stdlib` or `stdlib:BYTES` (the interpreter's own library, up to so many bytes), or
    `hf:NAME[:CONFIG][@SPLIT]`, a data set by name or a folder that the `datasets` library loads (`split` where the spec
    names none). `column` is where JSON lines, parquet and data sets keep the text; `streaming` reads a data set without
    storing it, and `max_documents` stops early. With `paragraphs` every block up to a blank line is a document.
    Iterating raises `InputError` on what cannot be read, and where there is no text at all.
    """

    spec: str
    column: str = "text"
    split: str = "train"
    streaming: bool = False
    max_documents: int | None = None
    paragraphs: bool = False

    def __iter__(self) -> Iterator[str]:
        documents: Iterator[str] = (text for text in self._documents() if text and not text.isspace())
        if self.paragraphs:
            blocks = (block for text in documents for block in _PARAGRAPH.findall(text))
            documents = (block for block in blocks if not block.isspace())
        documents = itertools.islice(documents, self.max_documents)
        first = next(documents, None)
        if first is None:
            raise InputError(f"{self.spec} is empty; it must hold some text")
        return itertools.chain([first], documents)

    def _documents(self) -> Iterator[str]:
        if self.spec == "stdlib" or self.spec.startswith("stdlib:"):
            return _standard_library(self.spec)
        if self.spec.startswith("hf:"):
            return _data_set(self)
        path = Path(self.spec)
        if path.is_dir():
            return (text for file in _files(path) for text in _read(file, self.column))
        if not path.exists():
            raise InputError(f"{path} does not exist; give a file, a folder, stdlib, or hf:NAME")
        return _read(path, self.column)


def _files(folder: Path) -> list[Path]:
    inside = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return [folder / path for path in inside if not any(part.startswith(".") for part in path.parts)]


def _read(path: Path, column: str) -> Iterator[str]:
    kind = Path(path.stem).suffix if path.suffix in _COMPRESSED else path.suffix
    if kind == ".parquet":
        return _parquet(path, column)
    return _json_lines(path, column) if kind in _JSON_LINES else _text(path)


def _text(path: Path) -> Iterator[str]:
    with _explained(str(path)), _open(path) as file:
        text = _decode(file.read(), path)
    yield from _SEPARATOR.split(text)


def _json_lines(path: Path, column: str) -> Iterator[str]:
    offset = 0
    with _explained(str(path)), _open(path) as file:
        for number, line in enumerate(file, 1):
            place = f"{path}, line {number}"
            text = _decode(line, path, offset)
            offset += len(line)
            if text.isspace():
                continue
            try:
                row = json.loads(text)
            except ValueError as error:
                raise InputError(f"{place} is not JSON ({error}); every line must be one JSON object") from None
            if not isinstance(row, dict):
                raise InputError(f"{place} is no JSON object; every line must be one")
            yield _cell(row, column, place)


def _parquet(path: Path, column: str) -> Iterator[str]:
    try:
        import pyarrow.parquet as pq
    except ImportError:
        raise InputError(f"{path} needs the pyarrow package; install caddf[hub]") from None
    with _explained(str(path)), _open(path) as file:
        table = pq.ParquetFile(file)
        if column not in table.schema_arrow.names:
            raise _no_column(str(path), column, table.schema_arrow.names)
        for number, row in enumerate(
            row for batch in table.iter_batches(columns=[column]) for row in batch.to_pylist()
        ):
            yield _cell(row, column, f"{path}, row {number}")


def _data_set(source: Source) -> Iterator[str]:
    try:
        import datasets
    except ImportError:
        raise InputError(f"{source.spec} needs the datasets package; install caddf[hub]") from None
    name, _, split = source.spec.removeprefix("hf:").partition("@")
    name, _, config = name.partition(":")
    with _explained(source.spec):
        rows = datasets.load_dataset(name, config or None, split=split or source.split, streaming=source.streaming)
        for number, row in enumerate(rows):
            yield _cell(row, source.column, f"{source.spec}, row {number}")


def _standard_library(spec: str) -> Iterator[str]:
    _, colon, cap = spec.partition(":")
    if colon and not cap.isdecimal():
        raise InputError(f"the source is {spec!r}; in stdlib:BYTES, BYTES must be a whole number")
    root = Path(sysconfig.get_path("stdlib"))
    names: list[Path] = []
    for folder, inside, files in os.walk(root):
        inside[:] = set(inside) - _NOT_WRITTEN_TO_BE_READ
        names += (Path(folder, file).relative_to(root) for file in files if file.endswith(".py"))
    # By hash, so that the files under a cap are a fair sample of the library.
    names.sort(key=lambda name: hashlib.sha256(name.as_posix().encode()).digest())
    total = 0
    for name in names:
        with _explained(str(root / name)):
            data = (root / name).read_bytes()
        total += len(data)
        if colon and total > int(cap):
            return
        try:
            yield data.decode("utf-8")
        except UnicodeDecodeError:
            continue


@contextmanager
def _explained(place: str) -> Iterator[None]:
    """What goes wrong in reading `place` becomes an `InputError`."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # each format's library has errors of its own
        reason = getattr(error, "strerror", None) or str(error).strip().split("\n")[0] or type(error).__name__
        raise InputError(f"{place} cannot be read: {reason}") from None


def _open(path: Path) -> BinaryIO:
    """The bytes of a file, decompressed."""
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.open(path))
    if path.suffix == ".xz":
        return cast(BinaryIO, lzma.open(path))
    if path.suffix == ".zst":
        try:
            import zstandard
        except ImportError:
            raise InputError(f"{path} needs the zstandard package; install caddf[hub]") from None
        return io.BufferedReader(zstandard.open(path))
    return path.open("rb")


def _decode(data: bytes, path: Path, offset: int = 0) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 at byte {offset + error.start}; convert it to UTF-8") from None


def _cell(row: dict[str, Any], column: str, place: str) -> str:
    if column not in row:
        raise _no_column(place, column, list(row))
    text = row[column]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise InputError(f"{place} has {type(text).__name__} in column {column!r}; it must be text")
    try:
        check_unicode(text)
    except InputError as error:
        raise InputError(f"{place}: {error}") from None
    return text


def _no_column(place: str, column: str, columns: list[str]) -> InputError:
    return InputError(f"{place} has no column {column!r}; it has {', '.join(columns) or 'none'}")
