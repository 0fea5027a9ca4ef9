"""Decoders: ways to fill in the masked positions of a canvas. A decoder is one file and one line of `DECODERS`."""

from typing import cast

from caddf.decoding.ancestral import Ancestral
from caddf.decoding.autoregressive import Autoregressive
from caddf.decoding.block import SemiAutoregressive
from caddf.decoding.confidence import Confidence, EntropyBound, Margin
from caddf.decoding.d3pm import D3PMAbsorbing, D3PMUniform
from caddf.decoding.first_hitting import FirstHitting
from caddf.decoding.gaussian import Gaussian
from caddf.decoding.hybrid import Hybrid
from caddf.decoding.rates import Euler, TauLeaping
from caddf.decoding.remasking import Remasking
from caddf.decoding.speculative import Speculative
from caddf.decoding.task import Counts, Decoder, Frame, Task

DECODERS: dict[str, type[Decoder]] = {
    "ancestral": Ancestral,
    "first_hitting": FirstHitting,
    "confidence": Confidence,
    "margin": Margin,
    "entropy_bound": EntropyBound,
    "block": SemiAutoregressive,
    "autoregressive": Autoregressive,
    "hybrid": Hybrid,
    "speculative": Speculative,
    "remasking": Remasking,
    "euler": Euler,
    "tau_leaping": TauLeaping,
    "d3pm_absorbing": D3PMAbsorbing,
    "d3pm_uniform": D3PMUniform,
    "gaussian": cast(type[Decoder], Gaussian),  # of a model on embeddings
}

__all__ = ["DECODERS", "Counts", "Decoder", "Frame", "Task", *sorted(t.__name__ for t in DECODERS.values())]
