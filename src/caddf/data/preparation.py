"""From documents to a token set on disk, whole or not at all."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from caddf.checkpoint import atomic_folder, write_json_atomic
from caddf.data.named import named
from caddf.data.sources import Source
from caddf.data.token_set import FORMAT, MANIFEST, SPLITS, VERSION, TokenSet, tokens_path
from caddf.errors import InputError, check_seed
from caddf.tokenizer import Tokenizer, bpe_size, pieces
from caddf.version import installed_version

HELD_OUT = 0.05
"""Share of the documents that `input` alone gives to validation, and again to test."""

Progress = Callable[[str, int], None]
"""Told the stage and the number of its documents so far, now and then."""


def prepare(
    out: str | Path,
    *,
    input: str | Path | None = None,
    train: str | Path | None = None,
    validation: str | Path | None = None,
    test: str | Path | None = None,
    tokenizer: str | Tokenizer = "bpe:8192",
    column: str = "text",
    streaming: bool = False,
    max_documents: int | None = None,
    data_root: str | Path | None = None,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> TokenSet:
    """Tokenises text into the folder `out`; the tokenizer sees training documents only.

    Either `train` is given, with `validation` and `test` if there are any, or `input`. A data set by name as `input` is
    its own splits, as many as there are. Other documents are shuffled by `seed` and split 90/5/5; if there is but one,
    its paragraphs (blocks up to a blank line) are the documents. Without training documents the tokenizer must be one
    that needs none. Sources, `column`, `streaming`, `data_root` and `max_documents` (of each source) are as in
    `Source`, tokenizers as in `Tokenizer.build`. Documents are read several times rather than kept in memory.

    Raises `InputError` before any long work where settings or input are bad, and leaves nothing behind on any error.
    `overwrite` replaces a token set, never another folder.
    """
    out, report = Path(out), progress or (lambda stage, documents: None)
    _check_folder(out, overwrite)
    specs = _requested(input, {"train": train, "validation": validation, "test": test}, tokenizer, data_root)
    check_seed(seed)
    if isinstance(tokenizer, str) and bpe_size(tokenizer) is None:
        tokenizer = Tokenizer.build(tokenizer)
    source = partial(Source, column=column, streaming=streaming, max_documents=max_documents, data_root=data_root)
    splits = _documents(specs, source, seed, report)
    try:
        with atomic_folder(out, replace=overwrite) as folder:
            _write(folder, splits, tokenizer, {"seed": seed, "column": column}, report)
    except OSError as error:
        raise InputError(f"{out} cannot be written: {error.strerror or error}") from None
    return TokenSet.open(out)


def _check_folder(out: Path, overwrite: bool) -> None:
    """Raises `InputError` where `out` is there already, unless it is a token set that may be overwritten."""
    if out.exists() and not (out / MANIFEST).is_file():
        raise InputError(f"out is {out}, which exists and is no token set; give another folder")
    if out.exists() and not overwrite:
        raise InputError(f"out is {out}, which exists; give a new folder, or --overwrite to replace it")


def _requested(
    input: str | Path | None,
    given: Mapping[str, str | Path | None],
    tokenizer: str | Tokenizer,
    data_root: str | Path | None,
) -> str | dict[str, str]:
    """The spec of the text that is to be split, or that of each split.

    Raises `InputError` where there is neither or both, and where `tokenizer` is made from documents that are not given.
    """
    if input is not None and any(given.values()):
        raise InputError("input is given together with train, validation or test; input alone is split")
    known = None if input is None else named(str(input), "train", data_root)
    if known is not None and "@" not in str(input):
        given = {split: f"{input}@{split}" for split in known.splits()}
        input = None
        if not given:
            raise InputError(f"{known.name} has no files in {data_root}; docs/evaluation.md says what they are called")
    trained = isinstance(tokenizer, str) and bpe_size(tokenizer) is not None
    if input is not None:
        return str(input)
    specs = {name: str(spec) for name, spec in given.items() if spec is not None}
    if not specs:
        raise InputError("no text is given; give input (stdlib needs no files), or train, validation and test")
    if trained and "train" not in specs:
        raise InputError(
            f"tokenizer is {tokenizer}, which is made from training documents; there are only those of "
            f"{', '.join(specs)}: give some, or a ready-made tokenizer (another token set's folder, gpt2, bytes)"
        )
    return specs


@dataclass(frozen=True)
class _Documents:
    """Those of a split, read anew whenever they are iterated, and where they are from."""

    texts: Iterable[str]
    place: str


def _documents(
    specs: str | dict[str, str], source: Callable[..., Source], seed: int, report: Progress
) -> dict[str, _Documents]:
    """The documents of each split, all of which have been read once; raises `InputError` where one cannot be."""
    if isinstance(specs, str):
        whole = source(specs)
        texts = dict(_split(whole, seed, report))
        place = whole.place
        return {name: _Documents(some, place) for name, some in texts.items()}
    sources = {name: source(spec, split=name) for name, spec in specs.items()}
    splits = {name: _Documents(each, each.place) for name, each in sources.items()}
    for each in sources.values():
        _count(each, report)
    return splits


def _split(source: Source, seed: int, report: Progress) -> Iterator[tuple[str, Iterable[str]]]:
    """The documents of each split: a shuffle of all by `seed`, cut 90/5/5, none of them empty."""
    count = _count(source, report)
    if count == 1:
        source = replace(source, paragraphs=True)
        count = _count(source, report)
    if count < 3:
        raise InputError(
            f"{source.spec} has {count} documents or paragraphs; to be split 90/5/5 it must have 3 or more"
        )
    held_out = max(1, round(HELD_OUT * count))
    order = np.random.default_rng(seed).permutation(count)
    split_of = np.zeros(count, dtype=np.uint8)
    split_of[order[:held_out]] = 1
    split_of[order[held_out : 2 * held_out]] = 2
    for index, name in enumerate(SPLITS):
        yield name, _Selected(source, split_of == index)


class _Selected:
    """The documents of a source that are marked, read anew whenever it is iterated."""

    def __init__(self, source: Source, marked: np.ndarray) -> None:
        self.source, self.marked = source, marked

    def __iter__(self) -> Iterator[str]:
        return itertools.compress(self.source, self.marked)


def _count(documents: Iterable[str], report: Progress) -> int:
    return sum(1 for _ in _watched(documents, "reading", report))


def _watched(documents: Iterable[str], stage: str, report: Progress, every: int = 64) -> Iterator[str]:
    for number, text in enumerate(documents):
        if number % every == 0:
            report(stage, number)
        yield text


def _write(
    folder: Path,
    splits: Mapping[str, _Documents],
    tokenizer: str | Tokenizer,
    settings: Mapping[str, Any],
    report: Progress,
) -> None:
    """The tokenizer, trained if it must be, the tokens of each split, and the manifest with `settings` among others."""
    if isinstance(tokenizer, str):
        tokenizer = Tokenizer.build(tokenizer, _watched(splits["train"].texts, "training the tokenizer", report))
    tokenizer.save(folder)
    dtype = "<u2" if tokenizer.vocab_size < 2**16 else "<u4"
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "created_by": f"caddf {installed_version()}",
        "tokenizer": {
            "name": tokenizer.name,
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "eos_id": tokenizer.eos_id,
        },
        "dtype": dtype,
        **settings,
        "splits": {},
    }
    for name, documents in splits.items():
        watched = _watched(documents.texts, f"tokenising {name}", report)
        counts = _write_tokens(tokens_path(folder, name), watched, tokenizer, dtype)
        manifest["splits"][name] = {"source": documents.place, **counts}
    write_json_atomic(folder / MANIFEST, manifest)


def _write_tokens(
    path: Path, documents: Iterable[str], tokenizer: Tokenizer, dtype: str, batch: int = 256
) -> dict[str, Any]:
    """Writes the tokens, EOS after every document; returns the manifest's counts."""
    tokens = count = size = 0
    digest = hashlib.sha256()
    parts = _parts(documents)
    with path.open("wb") as file:
        while some := list(itertools.islice(parts, batch)):
            encoded = tokenizer.encode_batch([piece for piece, _ in some])
            for ids, (piece, ends) in zip(encoded, some, strict=True):
                if ends:
                    ids.append(tokenizer.eos_id)
                tokens += len(ids)
                count += ends
                size += len(piece.encode())
            data = np.fromiter(itertools.chain.from_iterable(encoded), dtype).tobytes()
            digest.update(data)
            file.write(data)
    return {"tokens": tokens, "documents": count, "bytes": size, "sha256": digest.hexdigest()}


def _parts(documents: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Pieces of the documents, and whether each ends its document."""
    for text in documents:
        *before, last = pieces(text)
        yield from ((piece, False) for piece in before)
        yield last, True
