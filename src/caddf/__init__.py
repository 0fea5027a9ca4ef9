"""caddf: dual-branch absorbing-diffusion language models. Train, measure honestly, decode in parallel.

>>> import caddf
>>> model = caddf.load("run")
>>> for frame in caddf.generate(model, "Once upon a time", decoder="speculative"):
...     print(frame.text)
>>> caddf.evaluate(model, "data")["likelihoods"]["causal"]["ppl"]
>>> caddf.score(model, ["How likely is this?"])[0].sum()

Names are imported when they are first used, so that importing the package costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from caddf.errors import InputError
    from caddf.generation import generate
    from caddf.scoring import evaluate, score
    from caddf.text_model import TextModel, load

__all__ = ["InputError", "TextModel", "evaluate", "generate", "load", "score"]

_HOME = {
    "InputError": "errors",
    "TextModel": "text_model",
    "load": "text_model",
    "generate": "generation",
    "evaluate": "scoring",
    "score": "scoring",
}


def __getattr__(name: str) -> object:
    if name == "__version__":
        return import_module("caddf.version").installed_version()
    if name not in _HOME:
        raise AttributeError(f"module 'caddf' has no attribute {name!r}")
    return getattr(import_module(f"caddf.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
