"""Debug models over bytes, which tests write and score text with."""

import torch

from caddf import TextModel
from caddf.experiment import ARCHITECTURES, METHODS
from caddf.model_settings import ModelSettings
from caddf.tokenizer import Tokenizer


def text_model(method: str = "caddf-lambda-dce", scale: float = 1.0, **settings) -> TextModel:
    """A random model of context 32 in float64; with `scale` times the usual weights its draws differ more."""
    torch.manual_seed(0)
    tokenizer, kind = Tokenizer.plain_bytes(), METHODS[method]
    config = kind.configure(ModelSettings("debug", **settings), tokenizer.vocab_size, tokenizer.eos_id)
    network = ARCHITECTURES[kind.architecture].network(config).double().eval().requires_grad_(False)
    for parameter in network.parameters():
        parameter.mul_(scale)
    return TextModel(network, tokenizer, {"method": method, "objective": kind.defaults})
