"""Sources of every format, token sets that are whole or not there, and batches that resume anywhere."""

from __future__ import annotations

import dataclasses
import errno
import gzip
import itertools
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from caddf.data import Batches, Position, Source, TokenSet, prepare
from caddf.errors import InputError
from caddf.tokenizer import Tokenizer

DOCUMENTS = [f"Document {n}: é, 中 and 😀.\n\n  It has {n * n} lines." for n in range(40)]
JSON_LINES = "".join(json.dumps({"id": n, "text": text}) + "\n" for n, text in enumerate(DOCUMENTS)).encode()
SEPARATED = "\n<|endoftext|>\n".join(DOCUMENTS).encode()
LINES = [text + "\n" for text in DOCUMENTS[:-1]] + DOCUMENTS[-1:]


def zst(data: bytes) -> bytes:
    return pytest.importorskip("zstandard").compress(data)


def parquet(path: Path, column: str = "text") -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"id": range(len(DOCUMENTS)), column: DOCUMENTS}), path)


def documents_of(data: TokenSet, split: str) -> list[str]:
    """The texts of a split, from its tokens."""
    tokens = data.split(split).tokens
    ends = np.flatnonzero(tokens == data.tokenizer.eos_id)
    assert ends[-1] == len(tokens) - 1
    return [data.tokenizer.decode(part[part != data.tokenizer.eos_id]) for part in np.split(tokens, ends + 1)[:-1]]


# Sources


@pytest.mark.parametrize(
    ("suffix", "pack"), [("", bytes), (".gz", gzip.compress), (".xz", lzma.compress), (".zst", zst)]
)
@pytest.mark.parametrize(
    ("kind", "content", "documents"),
    [(".jsonl", JSON_LINES, DOCUMENTS), (".txt", SEPARATED, LINES), (".raw", SEPARATED, LINES), ("", SEPARATED, LINES)],
)
def test_files_are_read_as_their_suffix_says(
    kind: str, content: bytes, documents: list[str], suffix: str, pack: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    path = tmp_path / f"data{kind}{suffix}"
    path.write_bytes(pack(content))
    assert list(Source(str(path))) == documents


def test_parquet_is_read_by_column(tmp_path: Path) -> None:
    parquet(tmp_path / "data.parquet", "content")
    assert list(Source(str(tmp_path / "data.parquet"), column="content")) == DOCUMENTS
    with pytest.raises(InputError, match="no column 'text'; it has id, content"):
        list(Source(str(tmp_path / "data.parquet")))


def test_a_folder_is_its_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two.md").write_text("two")
    (tmp_path / "c.jsonl").write_text('{"text": "three"}\n\n{"text": null}\n{"text": "four"}')
    (tmp_path / "a.py").write_text("one\r\n", newline="")
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / ".hidden").write_text("hidden")
    assert list(Source(str(tmp_path))) == ["one\r\n", "two", "three", "four"]
    assert list(Source(str(tmp_path), max_documents=3)) == ["one\r\n", "two", "three"]


def test_data_sets_by_name_and_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(JSON_LINES)
    (folder / "test.jsonl").write_text('{"text": "held out"}\n')
    for streaming in (False, True):
        assert list(Source(f"hf:{folder}", streaming=streaming)) == DOCUMENTS
        assert list(Source(f"hf:{folder}", split="test", streaming=streaming)) == ["held out"]
    assert list(Source(f"hf:{folder}@test")) == ["held out"]
    for spec, complaint in ((f"hf:{folder}@dev", "dev"), (f"hf:{tmp_path / 'none'}", "none cannot be read")):
        with pytest.raises(InputError, match=complaint):
            list(Source(spec))


def test_the_standard_library_is_capped_and_ordered() -> None:
    some = list(Source("stdlib:300000"))
    assert len(some) > 5 and 150_000 < sum(len(text.encode()) for text in some) <= 300_000
    assert some == list(Source("stdlib", max_documents=len(some)))
    with pytest.raises(InputError, match="BYTES must be a whole number"):
        list(Source("stdlib:1MB"))


@given(st.text("ab \n\t\r", min_size=1).filter(lambda text: not text.isspace()))
def test_paragraphs_lose_nothing_but_blanks(text: str) -> None:
    class Text(Source):
        def _documents(self) -> Any:
            return iter([text])

    paragraphs = list(Text("text", paragraphs=True))
    assert "".join("".join(paragraphs).split()) == "".join(text.split())
    assert all("\n\n" not in paragraph.strip() for paragraph in paragraphs)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("empty.txt", b"", "empty.txt is empty"),
        ("blank.txt", b" \n\n", "blank.txt is empty"),
        ("empty.jsonl.gz", gzip.compress(b"", mtime=0), "empty.jsonl.gz is empty"),
        ("latin.txt", b"caf\xe9", "latin.txt is not UTF-8 at byte 3"),
        ("latin.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', "latin.jsonl is not UTF-8 at byte 24"),
        ("column.jsonl", b'{"text": "a"}\n{"body": "b"}\n', "line 2 has no column 'text'; it has body"),
        ("number.jsonl", b'{"text": 5}\n', "line 1 has int in column 'text'"),
        ("list.jsonl", b"[1]\n", "line 1 is no JSON object"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
        ("half.jsonl", b'{"text": "\\ud800"}\n', "line 1: character 0 of the text is a lone surrogate"),
        ("cut.txt.gz", gzip.compress(b"abc" * 99, mtime=0)[:-9], "cut.txt.gz cannot be read"),
        ("not.txt.xz", b"text", "not.txt.xz cannot be read"),
        ("not.txt.zst", b"text", "not.txt.zst cannot be read"),
        ("not.parquet", b"text", "not.parquet cannot be read"),
        ("two.jsonl", b'{"text": "a"}\n{"text": "b"}\n', "has 2 documents or paragraphs"),
        ("line.txt", b"one line\n", "has 1 documents or paragraphs"),
    ],
)
def test_bad_input_is_named_and_leaves_nothing(name: str, content: bytes, complaint: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=complaint):
        prepare(tmp_path / "out", input=tmp_path / name, tokenizer="bytes")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_pipe_is_refused_since_text_is_read_more_than_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="is a pipe or a device, and text is read more than once; write it to a file"):
        prepare(tmp_path / "out", input=tmp_path / "pipe", tokenizer="bytes")


# Token sets


def test_a_single_text_is_split_by_paragraph(tmp_path: Path) -> None:
    text = "".join(f"Paragraph {n}\nhas two lines.\n \n" for n in range(40))
    (tmp_path / "text.txt").write_text(text)
    data = prepare(tmp_path / "out", input=tmp_path / "text.txt", tokenizer="bytes")
    parts = [documents_of(data, split) for split in ("train", "validation", "test")]
    assert [len(part) for part in parts] == [36, 2, 2]
    assert sorted(itertools.chain(*parts)) == sorted(f"Paragraph {n}\nhas two lines.\n \n" for n in range(40))


def test_input_alone_is_split_by_document(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(JSON_LINES)
    one, two, other = (
        prepare(tmp_path / name, input=tmp_path / "in.jsonl", tokenizer="bpe:300", seed=seed)
        for name, seed in (("one", 0), ("two", 0), ("other", 1))
    )
    parts = [documents_of(one, split) for split in ("train", "validation", "test")]
    assert [len(part) for part in parts] == [36, 2, 2]
    assert sorted(itertools.chain(*parts)) == sorted(DOCUMENTS)
    assert one.manifest == two.manifest
    assert one.manifest["splits"]["test"]["sha256"] != other.manifest["splits"]["test"]["sha256"]
    assert one.tokenizer.fingerprint == Tokenizer.train("bpe:300", parts[0]).fingerprint
    for split, part in zip(("train", "validation", "test"), parts, strict=True):
        assert one.split(split).documents == len(part)
        assert one.split(split).bytes == sum(len(text.encode()) for text in part)


def test_three_documents_fill_three_splits(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n{"text": "c"}\n')
    data = prepare(tmp_path / "out", input=tmp_path / "in.jsonl", tokenizer="bytes")
    assert [data.split(name).documents for name in ("train", "validation", "test")] == [1, 1, 1]


def test_train_and_test_without_validation(tmp_path: Path) -> None:
    (tmp_path / "train.raw").write_text("abab abab")
    (tmp_path / "test.raw").write_text("cdcd cdcd")
    data = prepare(tmp_path / "out", train=tmp_path / "train.raw", test=str(tmp_path / "test.raw"), tokenizer="bpe:300")
    assert documents_of(data, "train") == ["abab abab"] and documents_of(data, "test") == ["cdcd cdcd"]
    assert b"ab" in data.tokenizer.token_bytes and b"cd" not in data.tokenizer.token_bytes
    with pytest.raises(InputError, match="no validation split; it has train, test"):
        data.split("validation")
    assert data.split("train").tokens.dtype == np.uint16
    with pytest.raises(InputError, match=r"the train split has \d tokens; one window needs 256"):
        data.split("train").windows(256)


def test_long_documents_are_written_in_pieces(tmp_path: Path) -> None:
    text = "one two three\n" * 3000
    (tmp_path / "long.txt").write_text(text)
    data = prepare(tmp_path / "out", train=tmp_path / "long.txt", tokenizer="bpe:270")
    assert data.split("train").tokens.tolist() == [*data.tokenizer.encode(text), data.tokenizer.eos_id]


@pytest.fixture
def data(tmp_path: Path) -> TokenSet:
    """A token set of JSON lines in bytes."""
    (tmp_path / "in.jsonl").write_bytes(JSON_LINES)
    return prepare(tmp_path / "out", input=tmp_path / "in.jsonl", tokenizer="bytes")


def test_windows_are_a_view(data: TokenSet) -> None:
    split = data.split("train")
    windows = split.windows(7)
    assert windows.shape == (len(split.tokens) // 7, 7) and np.shares_memory(windows, split.tokens)
    assert np.array_equal(windows.ravel(), split.tokens[: windows.size])


def test_settings_are_checked_before_anything_is_read(tmp_path: Path) -> None:
    for settings, complaint in (
        ({}, "no text is given; give input"),
        ({"validation": "x"}, "there are only those of validation: give some, or a ready-made"),
        ({"input": "stdlib", "test": "x"}, "input is given together"),
        ({"input": "stdlib", "tokenizer": "bpe:10"}, "at least 258"),
        ({"input": "stdlib", "tokenizer": "words"}, "tokenizer is 'words'"),
        ({"input": "stdlib", "seed": -1}, "seed is -1"),
        ({"input": tmp_path / "none"}, "none does not exist"),
        ({"train": "stdlib:100000", "validation": tmp_path / "none"}, "none does not exist"),
    ):
        with pytest.raises(InputError, match=complaint):
            prepare(tmp_path / "out", **settings)
    assert not list(tmp_path.iterdir())


def test_existing_folders_are_kept(data: TokenSet, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="out, which exists; give a new folder, or --overwrite"):
        prepare(data.folder, input=tmp_path / "in.jsonl", tokenizer="bytes")
    (tmp_path / "home").mkdir()
    with pytest.raises(InputError, match="home, which exists and is no token set"):
        prepare(tmp_path / "home", input=tmp_path / "in.jsonl", tokenizer="bytes", overwrite=True)
    again = prepare(data.folder, input=tmp_path / "in.jsonl", tokenizer="bpe:300", overwrite=True)
    assert again.tokenizer.name == TokenSet.open(data.folder).tokenizer.name == "bpe:300"
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "out", "home"}


@pytest.mark.parametrize(
    ("error", "raised"),
    [(KeyboardInterrupt(), KeyboardInterrupt), (OSError(errno.ENOSPC, "No space left on device"), InputError)],
)
@pytest.mark.parametrize("moment", ["numpy.fromiter", "json.dumps", "pathlib.Path.rename"])
def test_interrupted_leaves_what_was_there(
    data: TokenSet, tmp_path: Path, moment: str, error: BaseException, raised: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.read_bytes() for path in data.folder.iterdir()}

    def fail(*_: Any, **__: Any) -> None:
        raise error

    for out, overwrite in ((tmp_path / "new", False), (data.folder, True)):
        with monkeypatch.context() as patch:
            patch.setattr(moment, fail)
            with pytest.raises(raised, match="no space left while saving" if raised is InputError else None):
                prepare(out, input=tmp_path / "in.jsonl", tokenizer="bytes", overwrite=overwrite)
        assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "out"}
        assert {path: path.read_bytes() for path in data.folder.iterdir()} == before


def test_a_failed_replacement_is_undone(data: TokenSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.read_bytes() for path in data.folder.iterdir()}
    rename, calls = Path.rename, itertools.count(1)

    def fail_second(path: Path, target: Path) -> Path:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_second)
    with pytest.raises(KeyboardInterrupt):
        prepare(data.folder, input=tmp_path / "in.jsonl", tokenizer="bpe:300", overwrite=True)
    assert {path: path.read_bytes() for path in data.folder.iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "out"}


def test_no_documents_are_not_an_empty_source(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("text")
    with pytest.raises(InputError, match="max_documents is 0"):
        prepare(tmp_path / "out", train=tmp_path / "in.txt", tokenizer="bytes", max_documents=0)


def test_what_the_system_refuses_to_write_is_said(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    (tmp_path / "in.txt").write_text("a" * 50_000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # the tokenizer fits, 100,000 bytes of tokens do not
    try:
        with pytest.raises(InputError, match="out cannot be written: File too large"):
            prepare(tmp_path / "out", train=tmp_path / "in.txt", tokenizer="bytes")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["in.txt"]


def test_damaged_sets_are_refused(data: TokenSet, tmp_path: Path) -> None:
    manifest = data.folder / "manifest.json"
    whole = manifest.read_text()

    def refused(complaint: str) -> None:
        with pytest.raises(InputError, match=complaint):
            TokenSet.open(data.folder)

    with pytest.raises(InputError, match="is no token set"):
        TokenSet.open(tmp_path)
    manifest.write_text(whole[:50])
    refused("cannot be read")
    manifest.write_text("{}")
    refused("does not describe a token set")
    manifest.write_text(json.dumps({**json.loads(whole), "version": 99}))
    refused("version 99; this caddf reads version 1")
    manifest.write_text(whole)
    tokens = data.folder / "test.bin"
    kept = tokens.read_bytes()
    tokens.write_bytes(kept[:-2])
    refused(f"test.bin has {len(kept) - 2} bytes; the manifest says {len(kept)}")
    tokens.write_bytes(kept)
    Tokenizer.train("bpe:300", DOCUMENTS).save(data.folder)
    refused("another tokenizer")


def test_progress_is_told(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(JSON_LINES)
    told: list[tuple[str, int]] = []
    prepare(
        tmp_path / "out",
        input=tmp_path / "in.jsonl",
        tokenizer="bpe:300",
        progress=lambda stage, documents: told.append((stage, documents)),
    )
    stages = ["reading", "training the tokenizer", *(f"tokenising {s}" for s in ("train", "validation", "test"))]
    assert told == [(stage, 0) for stage in stages]


# Batches: the tokens are their own positions, so that a window tells where it starts.

SHAPES = st.tuples(st.integers(1, 9), st.integers(0, 60), st.integers(1, 7), st.integers(0, 5))


def batches_of(shape: tuple[int, int, int, int]) -> Batches:
    length, more, batch_size, seed = shape
    return Batches(np.arange(length + more, dtype=np.uint16), length, batch_size, seed)


@given(SHAPES)
def test_every_epoch_visits_every_window_once(shape: tuple[int, int, int, int]) -> None:
    batches, (length, more, batch_size, _) = batches_of(shape), shape
    position, starts = Position(), list[int]()
    while position.epoch < 3:
        batch, after = batches.take(position)
        assert batch.shape == (batch_size, length) and batch.dtype == torch.int64
        assert torch.equal(batch, batch[:, :1] + torch.arange(length))
        starts += batch[:, 0].tolist()
        position = after
    for _ in range(3):  # the first three epochs, cut where their windows are used up
        wanted = list(range(starts[0] % length, more + 1, length))
        visited, starts = starts[: len(wanted)], starts[len(wanted) :]
        assert sorted(visited) == wanted


@given(SHAPES, st.integers(0, 12))
def test_any_position_resumes(shape: tuple[int, int, int, int], steps: int) -> None:
    position, batches = Position(), batches_of(shape)
    for _ in range(steps):
        _, position = batches.take(position)
    saved = Position(**json.loads(json.dumps(dataclasses.asdict(position))))
    fresh = batches_of(shape)
    for _ in range(5):
        expected, position = batches.take(position)
        batch, saved = fresh.take(saved)
        assert torch.equal(batch, expected) and saved == position


@given(SHAPES, st.integers(1, 4), st.integers(0, 3))
def test_ranks_share_a_batch(shape: tuple[int, int, int, int], world: int, steps: int) -> None:
    length, more, rows, seed = shape
    batches = batches_of((length, more, rows * world, seed))
    position = Position(epoch=steps)
    whole, after = batches.take(position)
    parts = [batches.take(position, rank, world) for rank in range(world)]
    assert all(part.shape == (rows, length) and then == after for part, then in parts)
    assert torch.equal(torch.stack([part for part, _ in parts], 1).flatten(0, 1), whole)


def test_orders_and_borders_change_with_epoch_and_seed() -> None:
    tokens = np.arange(1000, dtype=np.uint16)
    first = [Batches(tokens, 10, 99, seed).take(Position(epoch))[0][:, 0] for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert all(not torch.equal(a, b) for a, b in ((first[0], first[1]), (first[0], first[2])))
    borders = {int(Batches(tokens, 10, 1, 0).take(Position(epoch))[0][0, 0]) % 10 for epoch in range(100)}
    assert borders == set(range(10))


def test_bad_batches_are_named() -> None:
    tokens = np.arange(120, dtype=np.uint16)
    with pytest.raises(InputError, match="has 120 tokens; one window needs 256"):
        Batches(tokens, 256, 1, 0)
    with pytest.raises(InputError, match="batch_size is 0"):
        Batches(tokens, 8, 0, 0)
    with pytest.raises(InputError, match="seed is -1"):
        Batches(tokens, 8, 1, -1)
    with pytest.raises(InputError, match="batch_size is 3; it must be a multiple of the 2 processes"):
        Batches(tokens, 8, 3, 0).take(Position(), 0, 2)
    with pytest.raises(InputError, match=r"window 500 of 1[45]"):
        Batches(tokens, 8, 3, 0).take(Position(0, 500))
