"""The tokenizers lose nothing, know their bytes, and are the same whenever they are made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from caddf.errors import InputError
from caddf.tokenizer import END_OF_TEXT, Tokenizer, pieces

TEXTS = ["def add(a, b):\n    return a + b\n" * 5, "The cat sat on the mat. Ünïcödé 中文 😀\n\n" * 5]
BPE = Tokenizer.train("bpe:300", TEXTS)
BYTES = Tokenizer.build("bytes")
STRINGS = st.text(st.characters(exclude_categories=["Cs"])) | st.text("ab \n\t'!é中😀<|>\x1c\x85\u3000")


@pytest.mark.parametrize("tokenizer", [BPE, BYTES], ids=["bpe", "bytes"])
@given(text=STRINGS)
def test_round_trip_is_exact(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert b"".join(tokenizer.token_bytes[i] for i in ids) == text.encode()
    assert tokenizer.eos_id not in ids


@given(text=STRINGS, size=st.integers(1, 5))
def test_a_text_may_be_encoded_in_pieces(text: str, size: int) -> None:
    parts = list(pieces(text, size))
    assert "".join(parts) == text
    assert [i for ids in BPE.encode_batch(parts) for i in ids] == BPE.encode(text)


def test_pieces_do_cut_texts() -> None:
    assert list(pieces("one two  three\n\nfour", 2)) == ["one", " two", "  three", "\n\nfour"]


@pytest.mark.parametrize("tokenizer", [BPE, BYTES], ids=["bpe", "bytes"])
def test_a_literal_end_of_text_is_text(tokenizer: Tokenizer) -> None:
    text = f"a{END_OF_TEXT} {END_OF_TEXT}\n"
    assert tokenizer.eos_id not in tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([tokenizer.eos_id]) == ""


def test_the_end_of_text_is_not_learnt_from_text_that_holds_it() -> None:
    tokenizer = Tokenizer.train("bpe:400", [END_OF_TEXT * 100])
    assert tokenizer.eos_id not in tokenizer.encode(END_OF_TEXT)


@pytest.mark.parametrize("tokenizer", [BPE, BYTES], ids=["bpe", "bytes"])
def test_bytes_of_tokens(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.token_bytes) == tokenizer.vocab_size
    assert {bytes([b]) for b in range(256)} <= set(tokenizer.token_bytes)
    assert tokenizer.token_bytes[tokenizer.eos_id] == b""
    lengths = torch.tensor([len(token) for token in tokenizer.token_bytes])
    assert torch.equal(tokenizer.byte_lengths, lengths) and tokenizer.byte_lengths.dtype == torch.int64


def test_sizes_and_names() -> None:
    assert (BPE.vocab_size, BPE.eos_id, BPE.name) == (300, 0, "bpe:300")
    assert (BYTES.vocab_size, BYTES.eos_id, BYTES.name) == (257, 256, "bytes")
    assert BYTES.encode("aé") == list("aé".encode())
    assert Tokenizer.train("bpe:5000", ["ab ab"]).name == "bpe:258"  # no second pair stands there twice


def test_invalid_utf8_decodes_to_replacement_characters() -> None:
    assert BYTES.decode([ord("a"), 0xC3, ord("b")]) == "a\ufffdb"


def test_training_is_deterministic() -> None:
    assert Tokenizer.train("bpe:300", TEXTS).fingerprint == BPE.fingerprint
    assert Tokenizer.train("bpe:300", TEXTS[:1]).fingerprint != BPE.fingerprint


@pytest.mark.parametrize("tokenizer", [BPE, BYTES], ids=["bpe", "bytes"])
def test_saved_is_loaded(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = Tokenizer.build(str(path))
        assert (loaded.vocab, loaded.merges, loaded.name) == (tokenizer.vocab, tokenizer.merges, tokenizer.name)
        assert loaded.fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize("names", [("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")])
def test_from_the_two_files_of_gpt2(names: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / names[0]).write_text(json.dumps(BPE.vocab))
    merges = ["#version: 0.2", *(" ".join(pair) for pair in BPE.merges)]
    (tmp_path / names[1]).write_text("\n".join(merges) + "\n", encoding="utf-8")
    tokenizer = Tokenizer.build(f"gpt2:{tmp_path}")
    assert tokenizer.fingerprint == BPE.fingerprint
    assert tokenizer.encode(TEXTS[1]) == BPE.encode(TEXTS[1])


@pytest.mark.parametrize("spec", ["bpe:", "bpe:x", "bpe:257", "bpe:-5", "bpe:3.5", "bpe", "word", ""])
def test_bad_specs_are_named(spec: str) -> None:
    with pytest.raises(InputError, match=f"tokenizer is {spec!r}"):
        Tokenizer.build(spec, TEXTS)


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"encoder\.json and vocab\.bpe"):
        Tokenizer.gpt2(tmp_path)
    path = tmp_path / "tokenizer.json"
    with pytest.raises(InputError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.load(tmp_path)
    path.write_text("{")
    with pytest.raises(InputError, match=r"tokenizer\.json is not a byte-level BPE"):
        Tokenizer.load(path)
    BPE.save(tmp_path)
    whole = json.loads(path.read_text())
    for change in (
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}},
        {"model": {"vocab": {"a": 0}, "merges": []}},
        {"model": {"vocab": BPE.vocab, "merges": [["a", "zzz"]]}},
        {"model": {"vocab": {**BPE.vocab, "again": 0}, "merges": []}},
    ):
        path.write_text(json.dumps({**whole, **change}))
        with pytest.raises(InputError, match=r"tokenizer\.json is not a byte-level BPE"):
            Tokenizer.load(path)


def test_the_hub_out_of_reach_is_said_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(repository: str, allow_patterns: list[str]) -> str:
        raise ConnectionError("no network")

    monkeypatch.setattr("caddf.tokenizer.snapshot_download", refuse)
    with pytest.raises(InputError, match=r"no network.*gpt2:FOLDER"):
        Tokenizer.build("gpt2")


def test_lone_surrogates_are_refused() -> None:
    with pytest.raises(InputError, match="character 1 of the text is a lone surrogate"):
        BPE.encode("a\ud800")
