"""caddf: dual-branch absorbing-diffusion language models. Train, measure honestly, decode in parallel.

>>> import caddf
>>> model = caddf.load("run")
>>> for frame in caddf.generate(model, "Once upon a time", decoder="speculative"):
...     print(frame.text)
>>> caddf.evaluate(model, "data")["likelihoods"]["causal"]["ppl"]
>>> caddf.score(model, ["How likely is this?"])[0].sum()
"""

from caddf.errors import InputError
from caddf.experiment import TextModel, load
from caddf.generation import generate
from caddf.scoring import evaluate, score

__all__ = ["InputError", "TextModel", "evaluate", "generate", "load", "score"]
