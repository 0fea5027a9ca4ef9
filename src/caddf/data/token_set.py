"""A token set: a folder with the tokens of each split, the tokenizer, and a manifest that says what they are."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, Integer
from torch import Tensor

from caddf.errors import InputError
from caddf.tokenizer import Tokenizer

FORMAT = "caddf token set"
VERSION = 1
MANIFEST = "manifest.json"
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Split:
    """Tokens of one split on disk: its documents one after the other, `<|endoftext|>` after each.

    `bytes` counts the UTF-8 bytes of the text.
    """

    name: str
    tokens: Integer[np.ndarray, " T"]
    documents: int
    bytes: int

    def windows(self, length: int) -> Integer[np.ndarray, "N L"]:
        """Windows of `length` tokens from the start, none overlapping, without the tail; raises `InputError`."""
        count = len(self.tokens) // length
        if not count:
            raise InputError(f"the {self.name} split has {len(self.tokens)} tokens; one window needs {length}")
        return self.tokens[: count * length].reshape(count, length)

    def spread(self, length: int, count: int) -> Int[Tensor, "N L"]:
        """`count` of its windows, or all where it has fewer, spread evenly over it."""
        windows = self.windows(length)
        index = torch.linspace(0, len(windows) - 1, min(count, len(windows))).long()
        return torch.from_numpy(windows[index.numpy()].astype("int64"))

    def counts(self, vocab_size: int) -> Int[Tensor, " V"]:
        """How often each token occurs."""
        parts = np.array_split(self.tokens, len(self.tokens) // 2**24 + 1)  # bincount makes 8 bytes of each token
        return torch.from_numpy(sum(np.bincount(part, minlength=vocab_size) for part in parts))


@dataclass(frozen=True)
class TokenSet:
    """A folder written by `prepare`."""

    folder: Path
    manifest: dict[str, Any]
    tokenizer: Tokenizer

    @classmethod
    def open(cls, folder: str | Path) -> TokenSet:
        """Opens and checks a token set; raises `InputError` where it is none, of another version, or cut off."""
        folder = Path(folder)
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(
                f"{folder} is no token set: it has no {MANIFEST}; `caddf data prepare` makes one"
            ) from None
        except (OSError, ValueError) as error:
            raise InputError(f"{folder / MANIFEST} cannot be read: {error}") from None
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise InputError(f"{folder / MANIFEST} does not describe a token set; `caddf data prepare` makes one")
        if (version := manifest.get("version")) != VERSION:
            raise InputError(f"{folder} is a token set of version {version}; this caddf reads version {VERSION}")
        tokenizer = Tokenizer.load(folder)
        try:
            made_with, item = manifest["tokenizer"]["fingerprint"], np.dtype(manifest["dtype"]).itemsize
            sizes = {name: split["tokens"] * item for name, split in manifest["splits"].items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{folder / MANIFEST} does not describe its tokens ({error}); prepare the set anew"
            ) from None
        if tokenizer.fingerprint != made_with:
            raise InputError(f"{folder} holds another tokenizer than its tokens were made with; prepare it anew")
        for name, wanted in sizes.items():
            path = tokens_path(folder, name)
            size = path.stat().st_size if path.exists() else 0
            if size != wanted:
                raise InputError(f"{path} has {size} bytes; the manifest says {wanted}: prepare the set anew")
        return cls(folder, manifest, tokenizer)

    def split(self, name: str) -> Split:
        """One of the splits, memory-mapped; raises `InputError` where the set does not have it."""
        if name not in self.manifest["splits"]:
            raise InputError(f"{self.folder} has no {name} split; it has {', '.join(self.manifest['splits'])}")
        about = self.manifest["splits"][name]
        tokens = np.memmap(tokens_path(self.folder, name), dtype=self.manifest["dtype"], mode="r")
        return Split(name, tokens, about["documents"], about["bytes"])

    def fingerprint(self, split: str) -> str:
        """That of the tokens of a split."""
        return str(self.manifest["splits"][split]["sha256"])


def tokens_path(folder: Path, split: str) -> Path:
    """Where the tokens of a split lie."""
    return folder / f"{split}.bin"
