"""Documents from files, folders, data sets by name, and the standard library's sources."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from caddf.data.named import NAMED, named
from caddf.data.rows import cell, explained, file_rows, files_of, hub_rows
from caddf.data.token_set import MANIFEST
from caddf.errors import InputError, at_least

_PARAGRAPH = re.compile(r".+?(?:\n\s*\n|\Z)", re.DOTALL)
# Installed packages, tests, files that are broken on purpose, and tables made by programs.
_NOT_WRITTEN_TO_BE_READ = set("site-packages dist-packages test tests idle_test lib2to3 encodings pydoc_data".split())


@dataclass(frozen=True)
class Source:
    """Documents, read anew whenever it is iterated; blank ones are left out.

    `spec` is a path (what its suffix means, `rows` says), `stdlib` or `stdlib:BYTES` (the interpreter's own library, up
    to so many bytes), a name of the table `NAMED` with its own columns (`NAME[:lines][@SPLIT]`, from local files under
    `data_root` where that is given; `:lines` takes rows as published, blank ones too), or `hf:NAME[:CONFIG][@SPLIT]`, a
    data set of the hub or a folder that the `datasets` library loads. `split` counts where the spec names none.
    `column` is where JSON lines, parquet, MDS shards and data sets keep the text; `streaming` reads a data set without
    storing it, and `max_documents` stops early. With `paragraphs` every block up to a blank line is a document.
    Iterating raises `InputError` on what cannot be read, and where there is no text at all.
    """

    spec: str
    column: str = "text"
    split: str = "train"
    streaming: bool = False
    max_documents: int | None = None
    paragraphs: bool = False
    data_root: str | Path | None = None

    def __iter__(self) -> Iterator[str]:
        known = named(self.spec, self.split, self.data_root)
        documents = self._documents() if known is None else known.documents(self.streaming)
        if known is None or not known.as_published:
            documents = (text for text in documents if text and not text.isspace())
        if self.paragraphs:
            blocks = (block for text in documents for block in _PARAGRAPH.findall(text))
            documents = (block for block in blocks if not block.isspace())
        at_least(1, self, "max_documents")
        documents = itertools.islice(documents, self.max_documents)
        first = next(documents, None)
        if first is None:
            raise InputError(f"{self.spec} is empty; it must hold some text")
        return itertools.chain([first], documents)

    @property
    def place(self) -> str:
        """The spec, and for a data set by name the files it stands for."""
        known = named(self.spec, self.split, self.data_root)
        return self.spec if known is None else known.place()

    def _documents(self) -> Iterator[str]:
        if self.spec == "stdlib" or self.spec.startswith("stdlib:"):
            return _standard_library(self.spec)
        if self.spec.startswith("hf:"):
            name, _, split = self.spec.removeprefix("hf:").partition("@")
            name, _, config = name.partition(":")
            rows = hub_rows(self.spec, name, config or None, split or self.split, self.streaming)
            return (cell(row, self.column, place) for place, row in rows)
        path = Path(self.spec)
        if not path.exists():
            raise InputError(f"{path} does not exist; give a file, a folder, stdlib, {', '.join(NAMED)}, or hf:NAME")
        if not (path.is_file() or path.is_dir()):
            raise InputError(f"{path} is a pipe or a device, and text is read more than once; write it to a file first")
        if (path / MANIFEST).is_file():
            raise InputError(f"{path} is a token set already; give text, or what it was prepared from")
        files = files_of(path) if path.is_dir() else [path]
        rows = (row for file in files for row in file_rows(file, [self.column]))
        return (cell(row, self.column, place) for place, row in rows)


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
        with explained(str(root / name)):
            data = (root / name).read_bytes()
        total += len(data)
        if colon and total > int(cap):
            return
        try:
            yield data.decode("utf-8")
        except UnicodeDecodeError:
            continue
