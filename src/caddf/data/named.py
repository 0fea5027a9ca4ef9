"""Data sets by name: where they are published, which rows are which split, and how a row becomes text.

A name is read from the hub, or from local files under a data root: `NAMED` is the table of both. Files are looked for
in ROOT/NAME, ROOT/REPOSITORY (the last part of the hub's name) and ROOT; the first pattern that matches there is read.
"""

from __future__ import annotations

import fnmatch
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import tokenizers

from caddf.data import detokenizers
from caddf.data.rows import Rows, cell, check_answer, explained, file_rows, files_of, hub_rows
from caddf.errors import InputError

SHORT = {"train": "train", "validation": "valid", "test": "test"}
LINES = ":lines"
"""What after a name asks for its rows as they are published, a document each, blank ones too."""

_HEADING = re.compile(r" = (?!= ).* = \n?")


class Documents(Protocol):
    """How rows become documents: the columns that it reads, and the documents of rows that lie in one of `folders`."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that it reads, first that of a text file's text."""

    def __call__(self, rows: Rows, folders: Sequence[Path]) -> Iterator[str]:
        """The documents, in order."""


@dataclass(frozen=True)
class Column:
    """A document a row: the text of one column, detokenised; with `strip`, without the white space around it."""

    name: str = "text"
    detokenise: Callable[[str], str] = str
    strip: bool = False

    @property
    def columns(self) -> tuple[str, ...]:
        """The column."""
        return (self.name,)

    def __call__(self, rows: Rows, folders: Sequence[Path]) -> Iterator[str]:
        """The text of each row."""
        texts = (cell(row, self.name, place) for place, row in rows)
        return (self.detokenise(text.strip() if self.strip else text) for text in texts)


@dataclass(frozen=True)
class Articles(Column):
    """WikiText's articles: its rows are lines; a top heading (` = Title = `) between blank lines begins an article."""

    def __call__(self, rows: Rows, folders: Sequence[Path]) -> Iterator[str]:
        """Articles of detokenised lines."""
        before, article = "", ""
        texts = itertools.chain((cell(row, self.name, place) for place, row in rows), [""])
        for line, after in itertools.pairwise(texts):
            if _HEADING.fullmatch(line) and not before.strip() and not after.strip():
                yield article
                article = ""
            # Line by line, so that a lone quotation mark does not unbalance those of the lines after.
            article += self.detokenise(line).lstrip(" ") or "\n"
            before = line
        yield article


@dataclass(frozen=True)
class Conversation:
    """An item of JSON-Mode-Eval as one text: the messages of `prompt`, then `completion`, with a blank line between.

    The messages are as they stand, without names of roles or a model's chat template: the system message already holds
    the schema, so the column `schema` adds nothing.
    """

    columns: tuple[str, ...] = ("prompt", "completion")

    def __call__(self, rows: Rows, folders: Sequence[Path]) -> Iterator[str]:
        """The text of each item."""
        for place, row in rows:
            messages = row.get("prompt")
            if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
                raise InputError(f"{place} has no list of messages in column 'prompt'")
            parts = [cell(message, "content", f"{place}, prompt") for message in messages]
            yield "\n\n".join(part.strip() for part in [*parts, cell(row, "completion", place)])


@dataclass(frozen=True)
class Packed:
    """ProLong's rows: `input_ids` of Llama 3, those of a document from `indices[i, 0]` to `indices[i, 1]`.

    They are decoded by `tokenizer.json` in one of the folders, or by that of `tokenizer` on the hub. A row that has
    `text` is that text.
    """

    tokenizer: str
    columns: tuple[str, ...] = ("text", "input_ids", "indices")

    def __call__(self, rows: Rows, folders: Sequence[Path]) -> Iterator[str]:
        """The documents, without special tokens."""
        decoder = None
        for place, row in rows:
            if "text" in row:
                yield cell(row, "text", place)
                continue
            if "input_ids" not in row:
                raise InputError(f"{place} has neither text nor input_ids; it has {', '.join(row) or 'no column'}")
            decoder = decoder or self._decoder(folders)
            ids = row["input_ids"]
            if (most := max(ids, default=0)) >= decoder.get_vocab_size():
                raise InputError(
                    f"{place} has token {most}; the tokenizer that decodes it has {decoder.get_vocab_size()}"
                )
            for start, end in row.get("indices", [(0, len(ids))]):
                yield decoder.decode([int(token) for token in ids[start:end]], skip_special_tokens=True)

    def _decoder(self, folders: Sequence[Path]) -> tokenizers.Tokenizer:
        found = [file for folder in folders if (file := folder / "tokenizer.json").is_file()]
        with explained(f"the tokenizer {found[0] if found else self.tokenizer}"):
            if found:
                return tokenizers.Tokenizer.from_file(str(found[0]))
            return tokenizers.Tokenizer.from_pretrained(self.tokenizer)


@dataclass(frozen=True)
class Part:
    """A split of ours: the split of that name on the hub, or only its rows in [start, stop)."""

    split: str
    start: int = 0
    stop: int | None = None

    def __str__(self) -> str:
        return self.split if self.stop is None and not self.start else f"{self.split}[{self.start}:{self.stop or ''}]"

    def of(self, rows: Iterable[Any]) -> Iterator[Any]:
        """Its rows."""
        return itertools.islice(rows, self.start, self.stop)


@dataclass(frozen=True)
class NamedSet:
    """One line of the table.

    hub, config, revision: what `datasets.load_dataset` is given. shards: of a repository that it cannot load, the
        pattern of its files, which are fetched one by one. splits: ours, as parts of the published.
    published: patterns of the published files, `{hub}` the published split. files: of other copies, `{split}` train,
        validation or test, `{short}` train, valid or test. samples: of copies that are no split, read as test.
    lines: the rows of a text file are its lines. line_rows: the documents, if the rows are asked for as published.
    """

    about: str
    hub: str | None
    splits: dict[str, Part]
    documents: Documents = Column()
    config: str | None = None
    revision: str | None = None
    shards: str | None = None
    published: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    samples: tuple[str, ...] = ()
    streaming: bool = False
    lines: bool = False
    line_rows: Documents | None = None


def _same(*splits: str) -> dict[str, Part]:
    return {split: Part(split) for split in splits}


_ALL = _same("train", "validation", "test")


def _wikitext(config: str, *files: str) -> NamedSet:
    return NamedSet(
        about="Wikipedia's good and featured articles (Merity et al. 2017), detokenised",
        hub="Salesforce/wikitext",
        config=f"{config}-raw-v1",
        splits=_ALL,
        documents=Articles(detokenise=detokenizers.wikitext),
        line_rows=Column(detokenise=detokenizers.wikitext),
        published=(f"{config}-raw-v1/{{hub}}-*.parquet",),
        files=(f"{config}-raw/wiki.{{short}}.raw", f"{config}/wiki.{{short}}.tokens", *files),
        lines=True,
    )


NAMED: dict[str, NamedSet] = {
    "wikitext2": _wikitext("wikitext-2", "wiki.{short}.raw"),
    "wikitext103": _wikitext("wikitext-103", "wiki103.{short}.tokens"),
    "c4": NamedSet(
        about="English web pages (Raffel et al. 2020); it has no test split: validation, second half, stands for it",
        hub="allenai/c4",
        config="en",
        # 364,608 rows are published as validation.
        splits={
            "train": Part("train"),
            "validation": Part("validation", 0, 182_304),
            "test": Part("validation", 182_304),
        },
        published=("en/c4-{hub}.*.json.gz",),
        samples=("c4_sample.jsonl*",),
        streaming=True,
    ),
    "fineweb": NamedSet(
        about="web pages (Penedo et al. 2024), the sample of 10B tokens; its first 20,000 are held out here",
        hub="HuggingFaceFW/fineweb",
        config="sample-10BT",
        splits={
            "train": Part("train", 20_000),
            "validation": Part("train", 0, 10_000),
            "test": Part("train", 10_000, 20_000),
        },
        published=("sample/10BT/*.parquet",),
        samples=("fineweb*.jsonl*",),
        streaming=True,
    ),
    "prolong": NamedSet(
        about="the books of ProLong's 64K data (Gao et al. 2025); it has no splits: the last folders are held out here",
        hub="princeton-nlp/prolong-data-64K",
        splits={
            "train": Part("proc[0-5]?-64"),
            "validation": Part("proc62-64"),
            "test": Part("proc63-64"),
        },
        documents=Packed("princeton-nlp/Llama-3-8B-ProLong-64k-Base"),
        shards="book-65536/{hub}/*.mds*",
        published=("book-65536/{hub}",),
        # Not ProLong, but long narratives too: the record of a token set names the file.
        samples=("books/test.jsonl*",),
        streaming=True,
    ),
    "json-mode-eval": NamedSet(
        about="100 questions with a JSON schema, and their answers (NousResearch): the paper's 'CFG'; a test set",
        hub="NousResearch/json-mode-eval",
        splits={"test": Part("train")},
        documents=Conversation(),
        published=("data/{hub}-*.parquet",),
        samples=("*json*mode*eval*.jsonl*", "*json*mode*eval*/*.jsonl*"),
    ),
    "lambada": NamedSet(
        about="passages of novels (Paperno et al. 2016), OpenAI's copy, not tokenised; a test set",
        hub="EleutherAI/lambada_openai",
        config="default",
        splits=_same("test"),
        documents=Column(detokenise=detokenizers.lambada),
        published=("data/lambada_test.jsonl", "lambada_test.jsonl"),
        files=("lambada_{split}_plain_text.txt",),
        lines=True,
    ),
    "ptb": NamedSet(
        about="the Wall Street Journal of Penn Treebank (Mikolov's copy), detokenised",
        hub="ptb-text-only/ptb_text_only",
        # The repository holds a script, which `datasets` no longer runs; these are the rows that the hub made of it.
        revision="refs/convert/parquet",
        splits=_ALL,
        documents=Column("sentence", detokenizers.penn_treebank, strip=True),
        published=("penn_treebank/{hub}/*.parquet",),
        files=("ptb.{short}.txt",),
        lines=True,
    ),
    "lm1b": NamedSet(
        about="sentences of news (Chelba et al. 2013), shuffled, detokenised",
        hub="dvruette/lm1b",
        splits=_same("train", "test"),
        documents=Column(detokenise=detokenizers.lm1b, strip=True),
        streaming=True,
        lines=True,
    ),
    "books": NamedSet(
        about="books in local files, a JSON line each",
        hub=None,
        splits=_ALL,
        files=("{short}*.jsonl*",),
    ),
}


@dataclass(frozen=True)
class Named:
    """A split of a set of the table, as `NAME[:lines]` names it: from the hub, or from files under `root`."""

    name: str
    split: str
    root: Path | None = None
    as_published: bool = False

    @property
    def set(self) -> NamedSet:
        """Its line of the table."""
        return NAMED[self.name]

    def splits(self) -> list[str]:
        """The splits that can be read: those that are published, or of which there are files under the root."""
        return list(self.set.splits) if self.root is None else [name for name in SHORT if self._local(name)]

    def place(self) -> str:
        """Where it is read from, for the record."""
        name = self.name + LINES * self.as_published
        if self.root is None:
            return f"{name}: {self.set.hub}, {self.set.splits.get(self.split)}"
        _, files = self._local(self.split) or (None, [])
        return f"{name}: {', '.join(str(file.relative_to(self.root)) for file in files)}"

    def documents(self, streaming: bool = False) -> Iterator[str]:
        """The documents; raises `InputError` where the set has no such split, or the root no files of it."""
        kind = self.set.line_rows if self.as_published else self.set.documents
        if kind is None:
            choices = ", ".join(name for name, row in NAMED.items() if row.line_rows)
            raise InputError(f"{self.name}{LINES} is asked for; only {choices} have rows that are no documents")
        if self.root is None:
            return kind(self._hub_rows(streaming, kind.columns), ())
        return kind(self._local_rows(self.root, kind.columns), self._folders(self.root))

    def _hub_rows(self, streaming: bool, columns: tuple[str, ...]) -> Rows:
        about = self.set
        if about.hub is None:
            raise InputError(f"{self.name} is not on the hub; give the data root that holds it")
        if self.split not in about.splits:
            raise InputError(f"{self.name} has no {self.split} split; it has {', '.join(about.splits)}")
        part = about.splits[self.split]
        if about.shards is not None:
            return _fetched(about.hub, about.shards.format(hub=part.split), columns)
        streaming = streaming or about.streaming
        return part.of(hub_rows(self.name, about.hub, about.config, part.split, streaming, about.revision))

    def _local_rows(self, root: Path, columns: tuple[str, ...]) -> Rows:
        found = self._local(self.split)
        if found is None:
            folders = ", ".join(map(str, self._folders(root)))
            wanted = ", ".join(pattern for pattern, _ in self._patterns(self.split))
            raise InputError(f"{self.name} has no {self.split} files in {folders}; there must be one of {wanted}")
        part, files = found
        inside = (file for path in files for file in (files_of(path) if path.is_dir() else [path]))
        return part.of(row for file in inside for row in file_rows(file, columns, self.set.lines))

    def _local(self, split: str) -> tuple[Part, list[Path]] | None:
        """The files of a split and which of their rows are its own."""
        for folder in self._folders(cast(Path, self.root)):
            for pattern, part in self._patterns(split):
                # Its own folder may hold whatever is named like a split; the root holds other sets' files too.
                if pattern == f"{split}*" and folder == self.root:
                    continue
                if files := sorted(folder.glob(pattern)):
                    return part, files
        return None

    def _patterns(self, split: str) -> list[tuple[str, Part]]:
        about, names = self.set, {"split": split, "short": SHORT.get(split, split)}
        part = about.splits.get(split)
        published = [(pattern.format(hub=part.split), part) for pattern in about.published] if part else []
        own = [pattern.format(**names) for pattern in about.files]
        samples = list(about.samples) if split == "test" else []
        return published + [(pattern, Part(split)) for pattern in [*own, f"{split}*", *samples]]

    def _folders(self, root: Path) -> list[Path]:
        names = [self.name, *([self.set.hub.split("/")[-1]] if self.set.hub else [])]
        return [*(root / name for name in dict.fromkeys(names)), root]


def named(spec: str, split: str, root: str | Path | None = None) -> Named | None:
    """The set that `NAME[:lines][@SPLIT]` names, or None where the spec is of another kind. Raises `InputError`."""
    name, _, given = spec.partition("@")
    as_published = name.endswith(LINES)
    name = name.removesuffix(LINES)
    if name not in NAMED:
        return None
    if root is not None and not Path(root).is_dir():
        raise InputError(f"data_root is {root}; it must be a folder")
    return Named(name, given or split, Path(root) if root else None, as_published)


def _fetched(hub: str, pattern: str, columns: tuple[str, ...]) -> Rows:
    """The rows of those files of a repository that match, each file fetched when its turn comes."""
    from huggingface_hub import HfApi, hf_hub_download

    check_answer(hub, hub)
    with explained(hub):
        files = sorted(fnmatch.filter(HfApi().list_repo_files(hub, repo_type="dataset"), pattern))
    if not files:
        raise InputError(f"{hub} has no files {pattern}")
    for file in files:
        with explained(f"{hub}/{file}"):
            path = Path(hf_hub_download(hub, file, repo_type="dataset"))
        yield from file_rows(path, columns)
