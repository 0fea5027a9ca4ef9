"""Settings and arguments of a wrong type are said, by name, wherever they are given."""

import dataclasses
import math
import re
import types
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
from over_bytes import text_model

import caddf
from caddf.benchmarks import DecodeSettings, InfillSettings
from caddf.data import TokenSet, prepare
from caddf.decoding import Speculative
from caddf.errors import Checked, InputError
from caddf.evaluation import EvaluationConfig
from caddf.evaluation.protocol import Protocol
from caddf.export import ExportSettings
from caddf.model_settings import ModelSettings
from caddf.objectives.forms import DenoisingConfig
from caddf.reproduce import ReproduceSettings
from caddf.running import RunSettings, ValidationSettings
from caddf.text_model import TextModel
from caddf.training.config import ResolvedTrainConfig

assert DecodeSettings and InfillSettings and ReproduceSettings and RunSettings  # which are kinds of settings, too


def kinds(of: type = Checked) -> list[type]:
    return [kind for each in of.__subclasses__() for kind in (each, *kinds(each))]


WINDOWS = torch.zeros(2, 8, dtype=torch.long)
WRONG: dict[Any, tuple[object, ...]] = {
    int: ("2", 2.5, True),
    float: ("2", [1.0], False),
    bool: ("no", 1),
    str: (5, b"x"),
    Literal: ("none of them", 3, None),
}


def of_what(hint: Any) -> Any:
    """`hint`, without None."""
    parts = [part for part in get_args(hint) if part is not type(None)]
    hint = parts[0] if isinstance(hint, types.UnionType) and len(parts) == 1 else hint
    return Literal if get_origin(hint) is Literal else hint


@pytest.mark.parametrize(
    "kind", [kind for kind in kinds() if kind is not ResolvedTrainConfig], ids=lambda kind: kind.__name__
)
def test_every_setting_must_be_what_its_type_says(kind):
    needed = {each.name: "x" for each in dataclasses.fields(kind) if each.default is each.default_factory}
    if any(get_type_hints(kind)[name] is not str for name in needed):
        needed = None  # a network's, which is not made of defaults
    checked = 0
    for name, hint in get_type_hints(kind).items():
        for wrong in WRONG.get(of_what(hint), ()) if needed is not None else ():
            if wrong is None and type(None) in get_args(hint):
                continue
            with pytest.raises(InputError, match=f"^{re.escape(kind.section)}{name} is .*; it must be "):
                kind(**{**needed, name: wrong})
            checked += 1
    assert checked or needed is None


def test_numbers_of_other_libraries_are_numbers():
    assert EvaluationConfig(samples=np.int64(3)).samples == 3 and Speculative(least=np.float32(0.5)).least == 0.5
    assert Speculative(least=0).least == 0 and EvaluationConfig(anchors=[0.5]).anchors == [0.5]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Protocol(bos="BOS"), "bos is BOS; it must be one of "),
        (lambda: ExportSettings("out", dtype="int4"), "dtype is int4; it must be one of "),
        (lambda: ModelSettings(fusion="nope"), "fusion is nope; it must be one of "),
        (lambda: DenoisingConfig(form="x"), "form is x; it must be one of lambda-dce, t-dce, ao"),
        (lambda: RunSettings("data", dtype="fp16"), "dtype is fp16; it must be one of auto, float32"),
        (lambda: EvaluationConfig(samples="2"), "samples is '2'; it must be a whole number"),
        (lambda: EvaluationConfig(nfe=4), "nfe is 4; it must be a list, each a whole number"),
        (lambda: EvaluationConfig(anchors=("a",)), "anchors is .* a list, each a number"),
        (lambda: Speculative(cache="no"), "cache is 'no'; it must be true or false"),
    ],
)
def test_settings_are_checked_by_type(make, said):
    with pytest.raises(InputError, match=said):
        make()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ModelSettings(match=0), "model.match is 0; it must be 1 or more, or not set"),
        (lambda: ValidationSettings(windows=0), "validation.windows is 0; it must be 1 or more"),
        (lambda: EvaluationConfig(nfe=(4, 0)), "nfe holds 0; each must be 1 or more"),
        (lambda: EvaluationConfig(anchors=(0.5, math.nan)), "anchors holds nan; each must lie in [0, 1]"),
        (lambda: EvaluationConfig(paths=-1), "paths is -1; it must be 0 or more (0: off)"),
        (lambda: EvaluationConfig(seed=2**62), f"seed is {2**62}; it must be 0 or more, and less than 2**62"),
    ],
)
def test_settings_are_checked_by_range(make, said):
    with pytest.raises(InputError, match=f"^{re.escape(said)}$"):
        make()


@pytest.fixture(scope="module")
def model():
    return text_model()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"prompt": 5}, "prompt is 5; it must be text or a list, each text"),
        ({"prompt": [5]}, r"prompt is \[5\]; it must be text"),
        ({"prompt": b"x"}, "prompt is b'x'"),
        ({"max_new_tokens": "3"}, "max_new_tokens is '3'; it must be a whole number"),
        ({"max_new_tokens": 3.5}, "max_new_tokens is 3.5; it must be a whole number"),
        ({"temperature": "1"}, "temperature is '1'; it must be a number"),
        ({"temperature": None}, "temperature is None; it must be a number"),
        ({"top_k": 2.5}, "top_k is 2.5; it must be a whole number"),
        ({"top_p": None}, "top_p is None; it must be a number"),
        ({"seed": None}, "seed is None; it must be a whole number"),
        ({"stop": [1]}, r"stop is \[1\]; it must be text"),
        ({"stop": None}, "stop is None; it must be text"),
        ({"decoder": []}, r"decoder is \[\]; it must be text"),
        ({"block_size": "8"}, "block_size is '8'; it must be a whole number"),
        ({"drafts": 2.5}, "drafts is 2.5; it must be a whole number"),
        ({"lookup": None}, "lookup is None; it must be a whole number"),
        ({"decoder": "ancestral", "steps": "4"}, "steps is '4'; it must be a whole number"),
        ({"decoder": "hybrid", "steps": 0}, "steps is 0; it must be 1 or more"),
        ({"model": "checkpoints/tiny"}, "model is 'checkpoints/tiny'; it must be a TextModel"),
    ],
)
def test_generate_says_which_argument_is_wrong(model, given, said):
    with pytest.raises(InputError, match=said):
        caddf.generate(**{"model": model, "prompt": "x", "decoder": "speculative", **given})


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda model: caddf.score(model, 5), "texts is 5; it must be text or a list, each text"),
        (lambda model: caddf.score(model, [5]), r"texts is \[5\]"),
        (lambda model: caddf.score(model.model, "x"), "model is a DualBranch; it must be a TextModel"),
        (lambda model: caddf.score(model, "x", block_size="4"), "block_size is '4'; it must be a whole number"),
        (lambda model: caddf.score(model, "x", likelihood="exact"), "likelihood is exact; it must be one of causal"),
        (lambda model: caddf.load(None), "source is None; it must be text or a Path"),
        (lambda model: caddf.load("x", device=None), "device is None; it must be text or a device"),
        (lambda model: caddf.load("x", compile="sometimes"), "compile is sometimes; it must be one of "),
        (lambda model: caddf.load("x", quantize="int4"), "quantize is int4; it must be one of "),
        (lambda model: caddf.evaluate("run", "set"), "model is run; it must be a model, as caddf.load"),
        (lambda model: caddf.evaluate(model, None), "data is None; it must be a TokenSet"),
        (lambda model: caddf.evaluate(model, [[1, 2]]), "data is .*; it must be a TokenSet"),
        (
            lambda model: caddf.evaluate(model, torch.zeros(2, 8)),
            "windows is of torch.float32; it must be whole",
        ),
        (
            lambda model: caddf.evaluate(model, torch.zeros(2, 8).long(), split="test"),
            "split is test, but data is windows",
        ),
        (
            lambda model: caddf.evaluate(model, torch.zeros(2, 8).long(), settings={}),
            "settings is {}; it must be an Eval",
        ),
    ],
)
def test_the_other_calls_do_so_too(model, call, said):
    with pytest.raises(InputError, match=said):
        call(model)


def test_a_set_whose_manifest_lacks_something_is_refused(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("some text\n\n" * 50, encoding="utf-8")
    place = tmp_path / "set"
    prepare(place, input=str(text), tokenizer="bytes")
    manifest = (place / "manifest.json").read_text(encoding="utf-8")
    for name in ("version", "tokenizer", "splits", "dtype"):
        (place / "manifest.json").write_text(manifest.replace(f'"{name}"', '"other"'), encoding="utf-8")
        with pytest.raises(InputError, match=r"of version None|does not describe its tokens .*prepare the set anew"):
            TokenSet.open(place)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"method": "caddf-next"}, "config.json has the method 'caddf-next'; this version has caddf-lambda-dce"),
        ({"method": []}, r"config.json has the method \[\]"),
        ({"method": "sedd-scaled"}, "has an objective that sedd-scaled does not have here: 'objective'"),
        ({"method": "radd-ao", "objective": {"no": 1}}, "has an objective that radd-ao does not have here"),
        ({"architecture": []}, r"architecture is \[\]; this version has"),
    ],
)
def test_a_model_of_what_is_not_there_is_refused(model, tmp_path, change, said):
    TextModel(model.model, model.tokenizer, change).save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match=said):
        caddf.load(tmp_path / "model")


def test_a_model_that_is_saved_again_is_of_this_version(model, tmp_path):
    TextModel(model.model, model.tokenizer, {"caddf_version": "0.0.1"}).save_pretrained(tmp_path / "model")
    said = (tmp_path / "model" / "config.json").read_text(encoding="utf-8")
    assert f'"caddf_version": "{caddf.__version__}"' in said and Path(tmp_path / "model" / "tokenizer.json").is_file()
