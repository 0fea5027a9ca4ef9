"""From text to batches: sources of documents, token sets on disk, and the loader."""

from caddf.data.loader import Batches, Position
from caddf.data.named import NAMED, Named, NamedSet
from caddf.data.preparation import prepare
from caddf.data.sources import Source
from caddf.data.token_set import Split, TokenSet

__all__ = ["NAMED", "Batches", "Named", "NamedSet", "Position", "Source", "Split", "TokenSet", "prepare"]
