"""Byte-level BPE tokenizers: trained here, GPT-2's, or plain bytes.

Every tokenizer is a vocabulary and a list of merges over GPT-2's byte symbols and its splitting of text into words, so
any text is encoded without loss. `<|endoftext|>` is BOS and EOS; it is an entry of the vocabulary that no text reaches.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

import tokenizers
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from jaxtyping import Int
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor

from caddf.errors import InputError

END_OF_TEXT = "<|endoftext|>"
GPT2 = "openai-community/gpt2"
SPECS = "bpe:N (N tokens, trained here), bytes, gpt2, gpt2:FOLDER, or the path of a saved tokenizer"
_GPT2_FINGERPRINT = "2a84aa51ea049287ee4c5e438e96023cd6c3bc5250a519851ff57885941f125c"
_GPT2_FILES = [("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")]
_FILE = "tokenizer.json"

# GPT-2's symbols of the 256 bytes (Radford et al. 2019, `encoder.py`): printable bytes stand for themselves.
_PRINTABLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
_UNPRINTABLE = sorted(set(range(256)) - set(_PRINTABLE))
_BYTE_OF = {chr(b): b for b in _PRINTABLE} | {chr(256 + n): b for n, b in enumerate(_UNPRINTABLE)}

# Words never reach from what is not a space into a space, so here a text may be cut without changing its tokens.
_BETWEEN_WORDS = re.compile(r"(?<=[\w!-~])(?=[ \n])")


class Tokenizer:
    """Text to ids in [0, V) and back.

    `vocab` maps byte symbols to ids 0 .. V-1, `merges` are in order of priority. Raises `InputError` where they are no
    byte-level BPE.
    """

    def __init__(self, vocab: dict[str, int], merges: list[tuple[str, str]]) -> None:
        self.vocab, self.merges = vocab, merges
        if sorted(vocab.values()) != list(range(len(vocab))):
            raise InputError(f"the tokenizer's {len(vocab)} ids have gaps; they must run from 0 to {len(vocab) - 1}")
        if missing := {END_OF_TEXT, *_BYTE_OF} - vocab.keys():
            raise InputError(f"the tokenizer lacks {min(missing)!r}; it must hold {END_OF_TEXT} and all 256 bytes")
        if foreign := [token for token in vocab if token != END_OF_TEXT and not _BYTE_OF.keys() >= set(token)]:
            raise InputError(f"the tokenizer's token {foreign[0]!r} is not made of GPT-2's byte symbols")
        if broken := [pair for pair in merges if not vocab.keys() >= {*pair, "".join(pair)}]:
            raise InputError(f"the tokenizer merges {broken[0]}, which its vocabulary does not hold")
        self._backend = tokenizers.Tokenizer(models.BPE(vocab, merges))
        self._backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self._backend.decoder = decoders.ByteLevel()

    @classmethod
    def build(cls, spec: str, texts: Iterable[str] = ()) -> Tokenizer:
        """What `spec` (see `SPECS`) names; `texts` are read by `bpe:N` alone. Raises `InputError`."""
        if bpe_size(spec):
            return cls.train(spec, texts)
        if spec == "bytes":
            return cls.plain_bytes()
        if spec == "gpt2":
            return cls.gpt2()
        if spec.startswith("gpt2:"):
            return cls.gpt2(spec.removeprefix("gpt2:"))
        if spec and Path(spec).exists():
            return cls.load(spec)
        raise InputError(f"tokenizer is {spec!r}; it must be {SPECS}")

    @classmethod
    def train(cls, spec: str, texts: Iterable[str]) -> Tokenizer:
        """Byte-level BPE of `bpe:N`: N tokens in all, `<|endoftext|>` first; fewer if the texts have no more pairs."""
        size = bpe_size(spec)
        if not size:
            raise InputError(f"tokenizer is {spec!r}; one that is trained must be bpe:N")
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(
            vocab_size=size,
            min_frequency=2,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=list(_BYTE_OF),
            show_progress=False,
        )
        backend.train_from_iterator((piece for text in texts for piece in pieces(text)), trainer)
        return cls._from_json(backend.to_str())

    @classmethod
    def gpt2(cls, source: str | Path = GPT2) -> Tokenizer:
        """GPT-2's own, from a folder that holds its two vocabulary files, or from that repository of the hub."""
        if Path(source).is_dir():
            for names in _GPT2_FILES:
                vocab, merges = (Path(source) / name for name in names)
                if vocab.is_file() and merges.is_file():
                    return cls._from_files(vocab, merges)
            wanted = " or ".join(" and ".join(names) for names in _GPT2_FILES)
            raise InputError(f"{source} does not hold GPT-2's vocabulary; it must hold {wanted}")
        try:
            # Asks once; file by file the library goes on trying for half a minute where there is no network.
            folder = Path(snapshot_download(str(source), allow_patterns=list(_GPT2_FILES[1])))
            return cls._from_files(*(folder / name for name in _GPT2_FILES[1]))
        except (OSError, HfHubHTTPError, HFValidationError) as error:
            reason = str(error).strip().split("\n")[0]
            raise InputError(
                f"GPT-2's vocabulary is neither in a folder {source} nor to be had from the hub ({reason}); "
                "give gpt2:FOLDER with its two files"
            ) from None

    @classmethod
    def plain_bytes(cls) -> Tokenizer:
        """Byte b is token b; `<|endoftext|>` is 256."""
        return cls({**_BYTE_OF, END_OF_TEXT: 256}, [])

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """A tokenizer from `tokenizer.json`, or from the folder that holds one. Raises `InputError`."""
        path = Path(path) / _FILE if Path(path).is_dir() else Path(path)
        try:
            return cls._from_json(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"the tokenizer {path} cannot be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path} is not a byte-level BPE tokenizer: {error}") from None

    def save(self, folder: str | Path) -> None:
        """Writes `tokenizer.json`, in the format of the `tokenizers` library."""
        (Path(folder) / _FILE).write_text(self._backend.to_str(pretty=True), encoding="utf-8")

    @classmethod
    def _from_json(cls, text: str) -> Tokenizer:
        values = json.loads(text)
        before = values["pre_tokenizer"] or {}
        if values["normalizer"] or before.get("type") != "ByteLevel" or before["add_prefix_space"]:
            raise InputError(
                "the tokenizer changes text or is not byte-level; a byte-level BPE must keep text as it is"
            )
        pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in values["model"]["merges"])
        merges = [(left, right) for left, right in pairs]
        return cls(values["model"]["vocab"], merges)

    @classmethod
    def _from_files(cls, vocab: Path, merges: Path) -> Tokenizer:
        try:
            return cls(*models.BPE.read_file(str(vocab), str(merges)))
        except InputError:
            raise
        except Exception as error:  # the library raises nothing narrower
            raise InputError(f"{vocab} and {merges} are not a BPE vocabulary and its merges: {error}") from None

    @property
    def vocab_size(self) -> int:
        """V, the number of real tokens."""
        return len(self.vocab)

    @property
    def eos_id(self) -> int:
        """The id of `<|endoftext|>`: BOS and EOS."""
        return self.vocab[END_OF_TEXT]

    @property
    def name(self) -> str:
        """What it is: `bytes`, `gpt2`, or `bpe:V`."""
        if not self.merges:
            return "bytes"
        return "gpt2" if self.fingerprint == _GPT2_FINGERPRINT else f"bpe:{self.vocab_size}"

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the tokens in order of their ids and of the merges: equal if and only if all ids agree."""
        tokens = sorted(self.vocab, key=self.vocab.__getitem__)
        return hashlib.sha256(json.dumps([tokens, self.merges], separators=(",", ":")).encode()).hexdigest()

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes of every id; `<|endoftext|>` has none."""
        tokens = sorted(self.vocab, key=self.vocab.__getitem__)
        return [b"" if token == END_OF_TEXT else bytes(map(_BYTE_OF.__getitem__, token)) for token in tokens]

    @cached_property
    def byte_lengths(self) -> Int[Tensor, " V"]:
        """Number of bytes of every id."""
        return torch.tensor([len(token) for token in self.token_bytes])

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without BOS or EOS; a literal `<|endoftext|>` is text. Raises `InputError` on surrogates."""
        check_unicode(text)
        return [i for ids in self.encode_batch(list(pieces(text))) for i in ids]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` of each text, in parallel; long texts should come in `pieces`."""
        for text in texts:
            check_unicode(text)
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; what is not UTF-8 becomes U+FFFD, and `<|endoftext|>` nothing."""
        return b"".join(self.token_bytes[i] for i in ids).decode("utf-8", errors="replace")


def bpe_size(spec: str) -> int | None:
    """N of `bpe:N`, or None if `spec` is of another kind. Raises `InputError` where N is no size."""
    kind, _, size = spec.partition(":")
    if kind != "bpe":
        return None
    if not size.isdecimal() or int(size) < len(_BYTE_OF) + 2:
        raise InputError(
            f"tokenizer is {spec!r}; in bpe:N, N must be a whole number of at least {len(_BYTE_OF) + 2}: "
            f"256 bytes, {END_OF_TEXT} and one merge"
        )
    return int(size)


def pieces(text: str, size: int = 1 << 14) -> Iterator[str]:
    """`text` in pieces of about `size` characters whose encodings, joined, are those of the text."""
    start = 0
    while len(text) - start > size:
        boundary = _BETWEEN_WORDS.search(text, start + size)
        if boundary is None:
            break
        yield text[start : boundary.start()]
        start = boundary.start()
    yield text[start:]


def check_unicode(text: str) -> None:
    """Raises `InputError` where `text` holds half a surrogate pair, which no encoding can carry."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"character {error.start} of the text is a lone surrogate; text must be Unicode") from None
