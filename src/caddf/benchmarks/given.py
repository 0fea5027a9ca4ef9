"""What benchmarks are told: settings that several share, their checks, and how they stand beside the figures."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from caddf.benchmarks.roster import Roster, name_of, named_runs
from caddf.benchmarks.trial import check_tokenizer
from caddf.data import TokenSet
from caddf.errors import Checked, InputError, check_seed, once
from caddf.text_model import DType, model_folder
from caddf.tokenizer import Tokenizer


@dataclass(frozen=True)
class OnText(Checked):
    """Trained models, and the text that they are measured on.

    models: trained ones, NAME=RUN,... or a folder of runs.
    data: a token set.
    split: of the text.
    dtype: of weights and arithmetic.
    device: auto (a GPU where there is one), cpu, cuda or mps.
    """

    models: str | None = None
    data: str | None = None
    split: str = "test"
    dtype: DType = "float32"
    device: str = "auto"
    seed: int = 0

    def opened(self) -> tuple[Roster, TokenSet]:
        """Models and text; raises `InputError` where one is not given or not there, or a model has other tokens."""
        check_seed(self.seed)
        if self.models is None or self.data is None:
            raise InputError(
                "models or data is not given; give --models NAME=RUN,... or a folder of runs, and --data SET"
            )
        roster, data = Roster.of(models=self.models, device=self.device, dtype=self.dtype), TokenSet.open(self.data)
        for name, run in roster.trained.items():
            check_tokenizer(name, Tokenizer.load(model_folder(run)), data)
        data.split(self.split)
        return roster, data


def written(settings: Any) -> dict[str, Any]:
    """Settings as they are written: without the folders of this machine, but for the names of runs and token sets."""
    values: dict[str, Any] = dataclasses.asdict(settings)
    values |= {name: list(value) for name, value in values.items() if isinstance(value, tuple)}
    if values.get("models") is not None:  # trained ones have sizes of their own
        values |= dict.fromkeys({"size", "shape"} & values.keys())
    for name, short in (("models", named_runs), ("data", name_of), ("prompts", name_of), ("judge", name_of)):
        if values.get(name) is not None:
            values[name] = short(values[name])
    del values["out"]
    return values


def whole_numbers(name: str, given: str, least: int = 1) -> list[int]:
    """The numbers of `1,8`; raises `InputError` where they are none, below `least`, or one twice."""
    words = given.strip("[]").split(",")
    if not all(word.strip().isdecimal() and int(word) >= least for word in words):
        raise InputError(f"{name} is {given}; it must be whole numbers of {least} or more, as in {least},8")
    numbers = [int(word) for word in words]
    once(name, numbers)
    return numbers
