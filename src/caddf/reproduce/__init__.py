"""The paper's tables from nothing: what is missing is trained and measured, what is there is taken as it is.

`plan` says how each piece is made and where it lies, `tables` (for the first two, `perplexities`) what each table needs
and shows, `making` does it.
"""

from caddf.reproduce.making import reproduce
from caddf.reproduce.perplexities import perplexity, plus_minus
from caddf.reproduce.plan import SETS, ReproduceSettings
from caddf.reproduce.tables import TABLES

__all__ = ["SETS", "TABLES", "ReproduceSettings", "perplexity", "plus_minus", "reproduce"]
