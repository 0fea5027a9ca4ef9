"""Data sets by name: files in each published layout, read as documents; and how they become a token set."""

from __future__ import annotations

import gzip
import json
import struct
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import tokenizers

from caddf.data import NAMED, Source, TokenSet, prepare
from caddf.data.detokenizers import lambada, lm1b, penn_treebank, wikitext
from caddf.errors import InputError

SHORT = {"train": "train", "validation": "valid", "test": "test"}
PAPER = ["wikitext2", "wikitext103", "c4", "fineweb", "prolong", "json-mode-eval"]

WIKITEXT = (
    ' \n = First = \n \n A well @-@ known @,@ text , with " quotes " and 5 \' 10 " . \n \n = = Part = = \n \n'
    " x = 1 = y = \n It 's ( small ) . \n \n = Second Title = \n \n More : <unk> . \n"
)
ARTICLES = [
    '= First =\n\nA well-known,text, with "quotes" and 5 \' 10 ".\n\n== Part ==\n\nx = 1 = y =\nIt\'s (small).\n\n',
    "= Second Title =\n\nMore: <unk>.\n",
]


def put(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def json_lines(*rows: dict) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def parquet(path: Path, **columns: list) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def read(name: str, root: Path, split: str = "test", **settings) -> list[str]:
    return list(Source(name, split=split, data_root=root, **settings))


# MDS


def array(values: np.ndarray) -> bytes:
    """As `ndarray:DTYPE` is stored: the sizes of the axes, in one, two or four bytes each, and the values."""
    code = 0 if max(values.shape) < 2**8 else 1 if max(values.shape) < 2**16 else 2
    return bytes([values.ndim << 2 | code]) + np.array(values.shape, f"<u{1 << code}").tobytes() + values.tobytes()


def shard(columns: dict[str, str], rows: list[dict[str, bytes]], sizes: dict[str, int] | None = None) -> bytes:
    """An MDS shard of encoded values, as `MDSWriter` lays it out: columns in order of their names."""
    names, sizes = sorted(columns), sizes or {}
    about = json.dumps(
        {
            "column_encodings": [columns[name] for name in names],
            "column_names": names,
            "column_sizes": [sizes.get(name) for name in names],
            "compression": None,
            "format": "mds",
            "hashes": [],
            "size_limit": 2**26,
            "version": 2,
        },
        sort_keys=True,
    ).encode()
    bodies = [
        b"".join(struct.pack("<I", len(row[name])) for name in names if name not in sizes)
        + b"".join(row[name] for name in names)
        for row in rows
    ]
    first = 4 * (len(rows) + 2) + len(about)
    offsets = first + np.cumsum([0, *map(len, bodies)])
    return struct.pack("<I", len(rows)) + offsets.astype("<u4").tobytes() + about + b"".join(bodies)


def index(folder: Path, *shards: bytes, compressed: bool = False) -> None:
    """A folder of shards with their `index.json`."""
    listed = []
    for number, data in enumerate(shards):
        raw, packed = f"shard.{number:05}.mds", None
        if compressed:
            content = pytest.importorskip("zstandard").compress(data)
            packed = {"basename": raw + ".zstd", "bytes": len(content), "hashes": {}}
            put(folder / packed["basename"], content)
        else:
            put(folder / raw, data)
        listed.append({"raw_data": {"basename": raw, "bytes": len(data), "hashes": {}}, "zip_data": packed})
    put(folder / "index.json", json.dumps({"version": 2, "shards": listed}))


TEXTS = ["One.", "Two, é.", "Three.", "Four."]
TEXT_SHARDS = [
    shard(
        {"text": "str", "id": "int", "tags": "json", "secret": "pkl"},
        [
            {"text": text.encode(), "id": struct.pack("<q", 7), "tags": b"[1]", "secret": b"never read"}
            for text in texts
        ],
        {"id": 8},
    )
    for texts in (TEXTS[:3], TEXTS[3:])
]


@pytest.mark.parametrize("compressed", [False, True])
def test_mds_shards_are_read_in_order(tmp_path, compressed):
    index(tmp_path / "set", *TEXT_SHARDS, compressed=compressed)
    assert list(Source(str(tmp_path / "set"))) == TEXTS
    assert list(Source(str(tmp_path))) == TEXTS
    if compressed:  # what `streaming` leaves behind that keeps both
        put(tmp_path / "set/shard.00000.mds", TEXT_SHARDS[0])
        assert list(Source(str(tmp_path / "set"))) == TEXTS
    assert list(Source(str(next((tmp_path / "set").glob("*1.mds*"))))) == TEXTS[3:]


def test_damaged_mds(tmp_path):
    index(tmp_path, *TEXT_SHARDS)
    first = tmp_path / "shard.00000.mds"
    first.write_bytes(TEXT_SHARDS[0][:-1])
    with pytest.raises(InputError, match=f"{first} has {len(TEXT_SHARDS[0]) - 1} bytes; .*index.json says"):
        list(Source(str(tmp_path)))
    with pytest.raises(InputError, match="as an MDS shard should have"):
        list(Source(str(first)))
    first.write_bytes(b"x" * 9)
    with pytest.raises(InputError, match="no MDS shard, or only part of one"):
        list(Source(str(first)))
    first.unlink()
    with pytest.raises(InputError, match=r"lists shard.00000.mds, which is not there"):
        list(Source(str(tmp_path)))
    index(tmp_path, *TEXT_SHARDS)
    with pytest.raises(InputError, match="row 0 has no column 'body'; it has id, tags, text"):
        list(Source(str(tmp_path), column="body"))


def words(*texts: str) -> tokenizers.Tokenizer:
    """A tokenizer of whole words, with a special token that decoding leaves out."""
    vocabulary = {word: number for number, word in enumerate(["<bos>", *dict.fromkeys(" ".join(texts).split())])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "<bos>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.add_special_tokens(["<bos>"])
    return made


BOOKS = ["the first book ends", "the second", "a third book begins and ends"]
LONG = "word " * 300


@pytest.mark.parametrize("encoding", ["ndarray:uint32", "ndarray"])
def test_prolong_is_decoded_document_by_document(tmp_path, encoding):
    tokenizer = words(*BOOKS, LONG)
    rows = []
    for texts in (BOOKS[:2], BOOKS[2:], [LONG.strip()]):
        ids = [[0, *tokenizer.encode(text).ids] for text in texts]
        ends = np.cumsum([0, *map(len, ids)])
        spans = np.stack([ends[:-1], ends[1:]], 1)
        dtype = b"" if encoding.endswith("uint32") else bytes([32])
        rows.append(
            {
                "input_ids": dtype + array(np.concatenate(ids).astype("<u4")),
                "indices": dtype + array(spans.astype("<u4")),
                "domain": b"book",
                "length": struct.pack("<Q", 1),
            }
        )
    columns = {"input_ids": encoding, "indices": encoding, "domain": "str", "length": "uint64"}
    folder = tmp_path / "prolong-data-64K"
    index(
        folder / "book-65536/proc63-64",
        shard(columns, rows[:2], {"length": 8}),
        shard(columns, rows[2:], {"length": 8}),
    )
    index(folder / "book-65536/proc07-64", shard(columns, rows[2:], {"length": 8}))
    index(folder / "arxiv/proc63-64", *TEXT_SHARDS)
    tokenizer.save(str(folder / "tokenizer.json"))
    assert read("prolong", tmp_path) == [*BOOKS, LONG.strip()]
    assert read("prolong", tmp_path, "train") == [LONG.strip()]
    assert read("prolong", folder) == [*BOOKS, LONG.strip()]
    with pytest.raises(InputError, match="prolong has no validation files"):
        read("prolong", tmp_path, "validation")
    words("too few").save(str(folder / "tokenizer.json"))
    with pytest.raises(InputError, match=r"row 0 has token .*; the tokenizer that decodes it has 3"):
        read("prolong", tmp_path)


# Each set in the layouts in which it is found


@pytest.mark.parametrize(
    ("name", "path", "split"),
    [
        *(("wikitext2", f"wikitext-2-raw/wiki.{short}.raw", split) for split, short in SHORT.items()),
        *(("wikitext103", f"wikitext-103-raw/wiki.{short}.raw", split) for split, short in SHORT.items()),
        ("wikitext103", "wikitext-103/wiki.test.tokens", "test"),
        ("wikitext2", "wikitext/wiki.valid.raw", "validation"),
        ("wikitext103", "wikitext/wiki103.test.tokens", "test"),
        ("wikitext2", "wikitext2/test.txt", "test"),
    ],
)
def test_wikitext_files_are_articles(tmp_path, name, path, split):
    put(tmp_path / path, WIKITEXT)
    assert read(name, tmp_path, split) == ARTICLES
    other = "wikitext103" if name == "wikitext2" else "wikitext2"
    with pytest.raises(InputError, match=f"{other} has no {split} files in"):
        read(other, tmp_path, split)


@pytest.mark.parametrize("root", [".", "wikitext"])
def test_wikitext_as_the_hub_has_it(tmp_path, root):
    rows = ["" if line.isspace() else line for line in WIKITEXT.splitlines(keepends=True)]
    parquet(tmp_path / "wikitext/wikitext-2-raw-v1/test-00000-of-00001.parquet", text=rows)
    parquet(tmp_path / "wikitext/wikitext-2-raw-v1/validation-00000-of-00001.parquet", text=rows[10:])
    assert read("wikitext2", tmp_path / root) == ARTICLES
    # As the published evaluations read it: a document a row, blank ones too.
    published = read("wikitext2:lines", tmp_path / root)
    assert published == [wikitext(row) for row in rows] and published.count("") == 6
    put(tmp_path / "raw/wikitext-2-raw/wiki.test.raw", WIKITEXT)
    assert read("wikitext2:lines", tmp_path / "raw") == published


def test_c4(tmp_path):
    def packed(*texts: str) -> bytes:
        return gzip.compress(json_lines(*({"text": text, "url": "u", "timestamp": "t"} for text in texts)).encode())

    put(tmp_path / "c4/en/c4-validation.00000-of-00002.json.gz", packed("a", "b"))
    put(tmp_path / "c4/en/c4-validation.00001-of-00002.json.gz", packed("c"))
    put(tmp_path / "c4/en/c4-train.00000-of-01024.json.gz", packed("d"))
    assert read("c4", tmp_path, "validation") == ["a", "b", "c"]
    assert read("c4", tmp_path / "c4", "train") == ["d"]
    put(tmp_path / "sample/c4/c4_sample.jsonl", json_lines({"text": "e"}))
    assert read("c4", tmp_path / "sample") == ["e"]


def test_fineweb_holds_out_its_first_rows(tmp_path):
    texts = [f"page {number}" for number in range(20_003)]
    parquet(tmp_path / "fineweb/sample/10BT/000_00000.parquet", text=texts[:15_000], id=texts[:15_000])
    parquet(tmp_path / "fineweb/sample/10BT/001_00000.parquet", text=texts[15_000:], id=texts[15_000:])
    assert read("fineweb", tmp_path, "validation") == texts[:10_000]
    assert read("fineweb", tmp_path, "test") == texts[10_000:20_000]
    assert read("fineweb", tmp_path, "train") == texts[20_000:]
    put(tmp_path / "sample/fineweb/fineweb_edu_150docs.jsonl", json_lines({"text": "e"}))
    assert read("fineweb", tmp_path / "sample") == ["e"]


ITEM = {
    "prompt": [
        {"role": "system", "content": "Answer in JSON:\n<schema>\n{}\n</schema>\n"},
        {"role": "user", "content": "Q?"},
    ],
    "completion": '{"a": 1}',
    "schema": "{}",
}


def test_json_mode_eval_is_prompt_and_completion(tmp_path):
    text = 'Answer in JSON:\n<schema>\n{}\n</schema>\n\nQ?\n\n{"a": 1}'
    put(tmp_path / "a/json_mode_eval/json_mode_eval_subset.jsonl", json_lines(ITEM, ITEM))
    assert read("json-mode-eval", tmp_path / "a") == [text, text]
    parquet(
        tmp_path / "b/json-mode-eval/data/train-00000-of-00001.parquet", **{key: [value] for key, value in ITEM.items()}
    )
    assert read("json-mode-eval", tmp_path / "b") == [text]
    with pytest.raises(InputError, match="json-mode-eval has no train files"):
        read("json-mode-eval", tmp_path / "a", "train")
    put(tmp_path / "c/json-mode-eval/test.jsonl", json_lines({**ITEM, "prompt": "Q?"}))
    with pytest.raises(InputError, match="line 1 has no list of messages in column 'prompt'"):
        read("json-mode-eval", tmp_path / "c")


def test_lambada_ptb_lm1b_books(tmp_path):
    put(tmp_path / "lambada/lambada_test.jsonl", json_lines({"text": "“Yes,” he said. "}))
    assert read("lambada", tmp_path) == ['\n"Yes," he said.']
    put(tmp_path / "plain/lambada/lambada_test_plain_text.txt", "one passage\nanother\n")
    assert read("lambada", tmp_path / "plain") == ["\none passage", "\nanother"]
    put(tmp_path / "ptb/ptb.valid.txt", " the <unk> 's N N shares \n no n't \n")
    assert read("ptb", tmp_path, "validation") == ["the ?'s 1 1 shares", "non't"]
    parquet(tmp_path / "ptb_text_only/penn_treebank/test/0000.parquet", sentence=["$ N"])
    assert read("ptb", tmp_path) == ["$ N"]
    put(tmp_path / "lm1b/test.txt", 'He said , " No . "\n')
    assert read("lm1b", tmp_path) == ['He said, "No."']
    put(tmp_path / "books/test.jsonl", json_lines({"title": "T", "text": "A book."}))
    assert read("books", tmp_path) == ["A book."]
    # Where there is no ProLong, other long narratives stand in, and are named.
    assert read("prolong", tmp_path) == ["A book."]
    assert Source("prolong", split="test", data_root=tmp_path).place == "prolong: books/test.jsonl"


@pytest.mark.parametrize(
    ("detokenise", "text", "plain"),
    [
        (wikitext, " a @.@ b ; c ! [ d ] 3 ° C 's = = = ", " a.b; c! [d] 3°C's === "),
        (wikitext, " ' one ' { two } \n", " 'one' {two}\n"),
        (wikitext, " a , . b ", " a ,. b "),
        (penn_treebank, "a $ N N b\\/c the boys ' s # N x", "a $1 1 b/c the boys' s #1 x"),
        (lm1b, "See http : / / x ? What . It 's $ 5 , ( or ) so .", "See http://x? What. It's $5, (or) so."),
        (lambada, "  “ a ”\n", '\n" a "'),
    ],
)
def test_detokenizers(detokenise, text, plain):
    assert detokenise(text) == plain


# Names, splits, and token sets


def test_the_sets_of_the_paper_are_there():
    assert set(PAPER) <= set(NAMED)
    for name, about in NAMED.items():
        assert about.hub or name == "books"
        assert "test" in about.splits


@pytest.mark.parametrize("streaming", [False, True])
def test_the_hub_is_asked_for_the_right_rows(monkeypatch, streaming):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(name, config, **settings):
        asked.append((name, config, settings))
        return ({"text": str(number), "sentence": str(number)} for number in range(20_005))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, *_, **__: None)
    assert list(Source("fineweb@train", streaming=streaming)) == [str(number) for number in range(20_000, 20_005)]
    assert list(Source("ptb", split="test", streaming=streaming, max_documents=2)) == ["0", "1"]
    assert asked == [
        ("HuggingFaceFW/fineweb", "sample-10BT", {"split": "train", "streaming": True, "revision": None}),
        (
            "ptb-text-only/ptb_text_only",
            None,
            {"split": "test", "streaming": streaming, "revision": "refs/convert/parquet"},
        ),
    ]


@pytest.mark.parametrize("name", ["fineweb", "prolong", "hf:someone/text"])
def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch, name):
    datasets = pytest.importorskip("datasets")
    asked = []

    def no_network(self, repository, **settings):
        asked.append(repository)
        raise ConnectionError("no network")

    def go_on_trying(*_, **__):
        raise AssertionError("the libraries must not be called: they would try for half a minute")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", no_network)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", go_on_trying)
    monkeypatch.setattr(datasets, "load_dataset", go_on_trying)
    with pytest.raises(InputError, match=r"cannot be read: the hub does not answer \(no network\)"):
        list(Source(name))
    assert len(asked) == 1


def test_what_was_stored_before_needs_no_answer(monkeypatch, tmp_path):
    datasets = pytest.importorskip("datasets")

    def no_network(self, repository, **settings):
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", no_network)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: iter([{"text": "stored"}]))
    with pytest.raises(InputError, match="the hub does not answer"):
        list(Source("hf:someone/MyText"))
    (tmp_path / "someone___my_text").mkdir()
    assert list(Source("hf:someone/MyText")) == ["stored"]
    with pytest.raises(InputError, match="the hub does not answer"):
        list(Source("hf:someone/MyText", streaming=True))


def test_shards_are_fetched_one_by_one(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    for number, data in enumerate(TEXT_SHARDS):
        put(tmp_path / f"book-65536/proc63-64/shard.{number:05}.mds", data)
    listed = [f"book-65536/proc63-64/shard.0000{number}.mds" for number in (1, 0)]
    listed += [
        "book-65536/proc63-64/index.json",
        "book-65536/proc00-64/shard.00000.mds",
        "arxiv/proc63-64/shard.00000.mds",
    ]
    fetched = []

    def download(repository, file, repo_type):
        assert (repository, repo_type) == ("princeton-nlp/prolong-data-64K", "dataset")
        fetched.append(file)
        return str(tmp_path / file)

    monkeypatch.setattr(hub.HfApi, "dataset_info", lambda self, *_, **__: None)
    monkeypatch.setattr(hub.HfApi, "list_repo_files", lambda self, *_, **__: listed)
    monkeypatch.setattr(hub, "hf_hub_download", download)
    assert list(Source("prolong", split="test", max_documents=2)) == TEXTS[:2]
    assert fetched == listed[1:2]
    assert list(Source("prolong", split="test")) == TEXTS


@pytest.mark.parametrize(
    ("spec", "root", "complaint"),
    [
        ("c4", "none", "data_root is .*none; it must be a folder"),
        ("c4", "", "c4 has no test files in .*; there must be one of en/c4-validation"),
        ("c4:lines", "", "c4:lines is asked for; only wikitext2, wikitext103 have"),
        ("books", None, "books is not on the hub; give the data root"),
        ("lambada@train", None, "lambada has no train split; it has test"),
    ],
)
def test_what_is_not_there(tmp_path, spec, root, complaint):
    with pytest.raises(InputError, match=complaint):
        list(Source(spec, split="test", data_root=None if root is None else tmp_path / root))


def test_a_named_set_becomes_its_own_splits(tmp_path):
    put(tmp_path / "wikitext-2-raw/wiki.test.raw", WIKITEXT)
    put(tmp_path / "wikitext-2-raw/wiki.valid.raw", WIKITEXT)
    with pytest.raises(InputError, match="tokenizer is bpe:300, which is made from training documents; there are only"):
        prepare(tmp_path / "none", input="wikitext2", data_root=tmp_path, tokenizer="bpe:300")
    made = prepare(tmp_path / "made", input="wikitext2", data_root=tmp_path, tokenizer="bytes")
    assert isinstance(made, TokenSet) and list(made.manifest["splits"]) == ["validation", "test"]
    assert made.manifest["splits"]["test"]["source"] == "wikitext2: wikitext-2-raw/wiki.test.raw"
    assert made.split("test").documents == 2
    assert made.tokenizer.decode(made.split("test").tokens) == "".join(ARTICLES)
    put(tmp_path / "own.txt", "\n\n".join(ARTICLES))
    both = prepare(
        tmp_path / "both", train=tmp_path / "own.txt", test="wikitext2:lines", data_root=tmp_path, tokenizer="bpe:300"
    )
    # Blank rows are documents of nothing but EOS, as the published evaluations have it.
    assert both.manifest["splits"]["test"]["source"] == "wikitext2:lines: wikitext-2-raw/wiki.test.raw"
    assert Source("c4@test").place == "c4: allenai/c4, validation[182304:]"
    assert both.split("test").documents == len(WIKITEXT.splitlines())
    only = prepare(tmp_path / "only", test="wikitext2", data_root=tmp_path, tokenizer="bytes")
    assert list(only.manifest["splits"]) == ["test"]
    with pytest.raises(InputError, match="c4 has no files in"):
        prepare(tmp_path / "empty", input="c4", data_root=tmp_path, tokenizer="bytes")
