"""Rows of text from files and from the hub, each with the place it stands at.

What a file is, its suffix says: JSON lines (`.jsonl`, `.ndjson`, `.json`), parquet (`.parquet`), MDS shards (`.mds`),
else text; `.gz`, `.xz`, `.zst` and `.zstd` on top are compression. A text file is one document, or several if lines
that hold `<|endoftext|>` alone stand between them. A folder is all its files, in order of their paths; hidden ones do
not count.
"""

from __future__ import annotations

import gzip
import io
import json
import lzma
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from caddf.data.mds import INDEX, check_index, shard_rows
from caddf.errors import InputError
from caddf.tokenizer import check_unicode

Row = dict[str, Any]
Rows = Iterator[tuple[str, Row]]
"""Rows, each with its place: what a complaint about it names."""

_SEPARATOR = re.compile(r"^<\|endoftext\|>(?:\r?\n|\Z)", re.MULTILINE)
_JSON_LINES = {".jsonl", ".ndjson", ".json"}
_COMPRESSED = {".gz", ".xz", ".zst", ".zstd"}
_MDS = ".mds"


def files_of(folder: Path) -> list[Path]:
    """The files under a folder, in order of their paths; of an MDS data set its shards, checked against its index."""
    inside = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    files = [folder / path for path in inside if not any(part.startswith(".") for part in path.parts)]
    shards = [file for file in files if _kind(file) == _MDS]
    indices = [file for file in files if file.name == INDEX and any(file.parent in shard.parents for shard in shards)]
    for index in indices:
        with explained(str(index)):
            check_index(index)
    # A shard may lie there packed and unpacked at once.
    twice = {shard for shard in shards if shard.suffix in _COMPRESSED and shard.with_suffix("") in shards}
    return [file for file in files if file not in twice and file not in indices]


def file_rows(path: Path, columns: Sequence[str], lines: bool = False) -> Rows:
    """The rows of a file; those of a text file have its documents, or with `lines` its lines, in the first column."""
    kind = _kind(path)
    if kind == ".parquet":
        return _parquet(path, columns)
    if kind == _MDS:
        return _mds(path)
    if kind in _JSON_LINES:
        return _json_lines(path)
    return ((str(path), {columns[0]: text}) for text in (_lines(path) if lines else _text(path)))


def hub_rows(
    spec: str, name: str, config: str | None, split: str, streaming: bool, revision: str | None = None
) -> Rows:
    """The rows of a data set that the `datasets` library loads; `spec` is what complaints call it."""
    try:
        import datasets
        from datasets.naming import camelcase_to_snakecase
    except ImportError:
        raise InputError(f"{spec} needs the datasets package; install caddf[hub]") from None
    *owner, last = name.split("/")
    stored = Path(datasets.config.HF_DATASETS_CACHE, "___".join([*owner, camelcase_to_snakecase(last)]))
    if streaming or not stored.exists():  # what was stored before, the library finds without a network too
        check_answer(spec, name)
    with explained(spec):
        rows = datasets.load_dataset(name, config, split=split, streaming=streaming, revision=revision)
        for number, row in enumerate(rows):
            yield f"{spec}, row {number}", row


def check_answer(spec: str, name: str) -> None:
    """Raises `InputError` where the hub, asked for a data set, does not answer.

    The libraries would go on trying for half a minute.
    """
    if Path(name).exists() or constants.HF_HUB_OFFLINE:
        return
    try:
        HfApi().dataset_info(name, timeout=10, expand=["sha"])
    except (HfHubHTTPError, HFValidationError):
        return  # it answers; what is wrong, the libraries say
    except Exception as error:  # of the library that carries the request, which is another from version to version
        raise InputError(f"{spec} cannot be read: the hub does not answer ({error})") from None


def cell(row: Row, column: str, place: str) -> str:
    """The text in a column of a row, "" where it is null; raises `InputError` where there is none."""
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


@contextmanager
def explained(place: str) -> Iterator[None]:
    """What goes wrong in reading `place` becomes an `InputError`."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # each format's library has errors of its own
        reason = getattr(error, "strerror", None) or str(error).strip().split("\n")[0] or type(error).__name__
        raise InputError(f"{place} cannot be read: {reason}") from None


def _kind(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix in _COMPRESSED else path.suffix


def _text(path: Path) -> Iterator[str]:
    with explained(str(path)), _open(path) as file:
        text = _decode(file.read(), path)
    yield from _SEPARATOR.split(text)


def _lines(path: Path) -> Iterator[str]:
    """Lines with their line break; a blank one is "", as the hub's copies of such files have it."""
    offset = 0
    with explained(str(path)), _open(path) as file:
        for line in file:
            text = _decode(line, path, offset)
            offset += len(line)
            yield "" if text.isspace() else text


def _json_lines(path: Path) -> Rows:
    offset = 0
    with explained(str(path)), _open(path) as file:
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
            yield place, row


def _parquet(path: Path, columns: Sequence[str]) -> Rows:
    try:
        import pyarrow.parquet as pq
    except ImportError:
        raise InputError(f"{path} needs the pyarrow package; install caddf[hub]") from None
    with explained(str(path)), _open(path) as file:
        table = pq.ParquetFile(file)
        for column in columns:
            if column not in table.schema_arrow.names:
                raise _no_column(str(path), column, table.schema_arrow.names)
        rows = (row for batch in table.iter_batches(columns=list(columns)) for row in batch.to_pylist())
        for number, row in enumerate(rows):
            yield f"{path}, row {number}", row


def _mds(path: Path) -> Rows:
    with explained(str(path)), _open(path) as file:
        for number, row in enumerate(shard_rows(file.read())):
            yield f"{path}, row {number}", row


def _open(path: Path) -> BinaryIO:
    """The bytes of a file, decompressed."""
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.open(path))
    if path.suffix == ".xz":
        return cast(BinaryIO, lzma.open(path))
    if path.suffix in {".zst", ".zstd"}:
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


def _no_column(place: str, column: str, columns: list[str]) -> InputError:
    return InputError(f"{place} has no column {column!r}; it has {', '.join(columns) or 'none'}")
