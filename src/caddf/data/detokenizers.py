"""Text as it was before a data set's tokenizer pulled it apart: WikiText, Penn Treebank, LM1B, LAMBADA.

Each is a list of substitutions, made in this order (which matters: matches overlap), that gives what the evaluations of
SEDD, RADD, MDLM and BD3-LM give (`data.py`, `dataloader.py`; they took them from Megatron-LM). They are kept to the
letter where they are crude ("N" is one; a lone quotation mark pairs with the next), since the published numbers rest on
them. One rule is left out, which by a slip for digits after an apostrophe looks for slashes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Substitutions:
    """Regular expressions and what takes their place, one after the other."""

    rules: tuple[tuple[str, str], ...]

    def __call__(self, text: str) -> str:
        """The text after all of them."""
        for pattern, replacement in self.rules:
            text = re.sub(pattern, replacement, text)
        return text


def _close_up(opening: str, closing: str, inside: str) -> tuple[str, str]:
    """Takes away the space within a pair of brackets or quotation marks."""
    return rf"{opening}\s*({inside}*?)\s*{closing}", rf"{opening[-1]}\1{closing[-1]}"


wikitext = Substitutions(
    (
        ("s '", "s'"),
        *((rf" @{re.escape(mark)}@ ", mark) for mark in "-,."),
        *((rf" {re.escape(mark)} ", f"{mark} ") for mark in ":;.!?,"),
        _close_up(r"\(", r"\)", r"[^)]"),
        _close_up(r"\[", r"\]", r"[^\]]"),
        _close_up("{", "}", r"[^}]"),
        _close_up('"', '"', r'[^"]'),
        _close_up("'", "'", r"[^']"),
        ("= = = =", "===="),
        ("= = =", "==="),
        ("= =", "=="),
        (" ° ", "°"),
        (" \n", "\n"),
        ("\n ", "\n"),
        (" N ", " 1 "),
        (" 's", "'s"),
    )
)

penn_treebank = Substitutions(
    (
        (" 's", "'s"),
        ("s ' ", "s' "),
        (" n't", "n't"),
        (" \n ", "\n"),
        (r"\\/", "/"),
        (r" N(?= )", " 1"),
        (r"([$#]) 1", r"\g<1>1"),
        ("<unk>", "?"),
    )
)

lm1b = Substitutions(
    (
        (r"(https?) : / / ", r"\1://"),
        (r" '(\w+)", r"'\1"),
        (r" (\w+) \. ", r" \1. "),
        (r" (\w+) \.$", r" \1."),
        (r" \? ", "? "),
        (r" \?$", "?"),
        (" ! ", "! "),
        (" !$", "!"),
        *((f" {mark} ", f"{mark} ") for mark in ",:;"),
        (" / ", "/"),
        (r'" ([^"]+) "', r'"\1"'),
        (r"' ([^']+) '", r"'\1'"),
        (r"\( ([^()]+) \)", r"(\1)"),
        (r"\[ ([^\[\]]+) \]", r"[\1]"),
        (r"([$£]) ", r"\1"),
    )
)


def lambada(text: str) -> str:
    """Straight quotation marks, and a line break before the passage."""
    return "\n" + re.sub("[“”]", '"', text).strip()
