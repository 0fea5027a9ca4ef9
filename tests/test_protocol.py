"""Windows: every token is scored once, and the presets cut as the published evaluations do."""

from __future__ import annotations

import itertools
import re
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from caddf.data.token_set import Split
from caddf.errors import InputError
from caddf.evaluation.protocol import PRESETS, Protocol, Window, preset, stacked, windows

EOS = 0
ALL = Protocol(max_windows=None)


def text(*lengths: int) -> np.ndarray:
    """Documents of so many tokens, each ended by EOS; a token is its own number."""
    count = itertools.count(1)
    documents = [[next(count) for _ in range(length)] + [EOS] for length in lengths]
    return np.array(list(itertools.chain.from_iterable(documents)), dtype=np.uint16)


def plain(rows: list[Window]) -> list[list[int]]:
    return [row.tokens.tolist() for row in rows]


def scored(rows: list[Window]) -> list[int]:
    return [int(token) for row in rows for token in row.tokens[row.scored]]


def test_the_default_is_the_windows_of_a_split():
    tokens = text(7, 3, 11, 2)
    rows, counts = stacked(windows(tokens, ALL, EOS, context=5))
    assert rows.tolist() == Split("test", tokens, 4, 0).windows(5).tolist()
    assert counts.all() and rows.dtype == torch.int64


lengths = st.lists(st.integers(0, 12), min_size=1, max_size=5)


@given(lengths, st.integers(1, 9), st.data())
def test_every_token_is_scored_once_in_order(documents, room, data):
    protocol = replace(
        ALL,
        length=room + 2,
        stride=data.draw(st.integers(1, room)),
        documents=data.draw(st.sampled_from(["concatenate", "separate"])),
        bos="given",
        closed=True,
        eos=data.draw(st.booleans()),
        tail="score",
    )
    tokens = text(*documents)
    kept = tokens if protocol.eos else tokens[tokens != EOS]
    if not len(kept):
        with pytest.raises(InputError, match="one window needs"):
            windows(tokens, protocol, EOS)
        return
    rows = windows(tokens, protocol, EOS)
    assert all(row.tokens[0] == EOS and not row.scored[0] for row in rows)
    assert all(row.tokens[-1] == EOS and row.scored[-1] for row in rows)
    inner = [Window(row.tokens[1:-1], row.scored[1:-1]) for row in rows]
    assert scored(inner) == kept.tolist()
    assert all(1 <= len(row.tokens) <= room for row in inner)


@given(lengths, st.integers(1, 6), st.data())
def test_what_is_dropped_is_the_tail(documents, length, data):
    stride = data.draw(st.integers(1, length))
    tokens = text(*documents)
    protocol = replace(ALL, length=length, stride=stride)
    if len(tokens) < length:
        with pytest.raises(InputError, match=f"one window needs {length}"):
            windows(tokens, protocol, EOS)
        return
    rows = windows(tokens, protocol, EOS)
    assert {len(row.tokens) for row in rows} == {length}
    kept = scored(rows)
    assert kept == tokens[: len(kept)].tolist() and len(tokens) - len(kept) < stride


def test_a_stride_gives_context():
    rows = windows(text(9), replace(ALL, length=4, stride=2, tail="score"), EOS)
    assert plain(rows) == [[1, 2, 3, 4], [3, 4, 5, 6], [5, 6, 7, 8], [7, 8, 9, EOS]]
    assert [row.scored.tolist() for row in rows] == [[True] * 4] + [[False, False, True, True]] * 3


def test_documents_apart():
    protocol = replace(ALL, length=3, documents="separate", tail="score")
    assert plain(windows(text(4, 1), protocol, EOS)) == [[1, 2, 3], [4, EOS], [5, EOS]]
    assert plain(windows(text(4, 1), replace(protocol, eos=False), EOS)) == [[1, 2, 3], [4], [5]]
    assert plain(windows(text(4, 1), replace(protocol, tail="drop"), EOS)) == [[1, 2, 3]]
    with pytest.raises(InputError, match="the windows have 2 to 3 tokens; with tail=drop"):
        stacked(windows(text(4, 1), protocol, EOS))


def group_texts(rows: list[list[int]], size: int, wrapped: bool) -> list[list[int]]:
    """What SEDD, RADD and, `wrapped`, MDLM and BD3-LM do with tokenised rows (of one batch of `datasets.map`)."""
    everything = list(itertools.chain.from_iterable(rows))
    size -= 2 * wrapped
    chunks = [everything[start : start + size] for start in range(0, len(everything) // size * size, size)]
    return [[EOS, *chunk, EOS] for chunk in chunks] if wrapped else chunks


@pytest.mark.parametrize("name", ["sedd", "radd", "mdlm", "mdlm-ar", "bd3lm"])
def test_presets_cut_as_published(name):
    documents = (700, 0, 1500, 1, 1023, 1024, 2000)
    tokens = text(*documents)
    rows = [part.tolist() for part in np.split(tokens, np.flatnonzero(tokens == EOS) + 1)[:-1]]
    if name == "bd3lm":
        rows = [row[:-1] for row in rows]
    wrapped = name in ("mdlm", "mdlm-ar", "bd3lm")
    cut, counts = stacked(windows(tokens, PRESETS[name], EOS))
    assert cut.tolist() == group_texts(rows, 1024, wrapped)
    assert counts[:, 1:].all()
    assert counts[:, 0].all() == (name in ("sedd", "radd", "mdlm"))


def test_some_windows_are_chosen_by_seed():
    tokens = text(399)
    every = plain(windows(tokens, replace(ALL, length=4), EOS))
    few = plain(windows(tokens, Protocol(length=4, max_windows=10), EOS))
    assert len(few) == 10 and few == [row for row in every if row in few]
    assert few == plain(windows(tokens, Protocol(length=4, max_windows=10), EOS))
    # Another seed chooses the same 10 of 100 with odds of 1 in 10^13.
    assert few != plain(windows(tokens, Protocol(length=4, max_windows=10, seed=1), EOS))


def test_windows_know_their_place():
    tokens = text(399)
    every = windows(tokens, replace(ALL, length=4), EOS)
    assert [row.index for row in every] == list(range(100))
    for row in windows(tokens, Protocol(length=4, max_windows=10), EOS):
        assert row.tokens.tolist() == every[row.index].tokens.tolist()


@pytest.mark.parametrize("eos", [True, False])
@pytest.mark.parametrize("documents", ["concatenate", "separate"])
def test_windows_are_of_the_document_in_which_they_score_first(documents, eos):
    tokens = text(4, 1, 7, 2)
    which = np.repeat(np.arange(4), [5, 2, 8, 3])  # with their EOS
    at = {int(token): int(document) for token, document in zip(tokens, which, strict=True) if token != EOS}
    for stride in (2, 4):
        protocol = replace(ALL, length=4, stride=stride, documents=documents, eos=eos, tail="score")
        for row in windows(tokens, protocol, EOS):
            first = row.tokens[row.scored][0].item()
            if first != EOS:
                assert row.document == at[first]


def test_what_is_no_window():
    tokens = torch.arange(3)
    for scored in ([True, False, True], [False, False, False], [True, True, False]):
        with pytest.raises(InputError, match="given tokens come first"):
            Window(tokens, torch.tensor(scored))
    with pytest.raises(InputError, match=r"scored has shape \(2,\)"):
        Window(tokens, torch.ones(2, dtype=torch.bool))


def test_presets_have_names():
    assert all(protocol.name == name for name, protocol in PRESETS.items()) and preset("sedd") is PRESETS["sedd"]
    with pytest.raises(InputError, match="protocol is gpt; it must be one of caddf, sedd, radd, mdlm, mdlm-ar, bd3lm"):
        preset("gpt")


@pytest.mark.parametrize(
    ("protocol", "complaint"),
    [
        (Protocol(), "length is not set"),
        (Protocol(length=2, bos="given", closed=True), "length is 2; beside BOS and EOS"),
        (Protocol(length=4, stride=5), "stride is 5; it must be at most the 4 tokens"),
        (Protocol(length=4, stride=2, bos="scored"), "stride is 2 and bos is scored; what overlaps is given"),
        (Protocol(length=50), "the test split has 4 tokens; one window needs 50"),
    ],
)
def test_what_cannot_be_cut(protocol, complaint):
    with pytest.raises(InputError, match=complaint):
        windows(text(3), protocol, EOS)


@pytest.mark.parametrize("setting", ["length", "stride", "max_windows", "samples"])
def test_bad_settings(setting):
    with pytest.raises(InputError, match=f"{setting} is 0; it must be 1 or more"):
        Protocol(**{setting: 0})


def test_the_document_has_the_presets():
    page = (Path(__file__).parent.parent / "docs/evaluation.md").read_text(encoding="utf-8")
    table = {
        cells[0]: cells[1:]
        for line in page.splitlines()
        if (cells := re.findall(r"`([^`]*)`", line)) and line[0] == "|"
    }
    for name, protocol in PRESETS.items():
        names = [field.name for field in fields(Protocol) if field.name not in ("name", "seed")]
        assert table[name] == [str(getattr(protocol, each)) for each in names]
