"""Settings as options: names, types, defaults and help come from the dataclasses, errors come out as sentences."""

from dataclasses import dataclass, fields
from typing import Literal

import pytest

from caddf.decoding import DECODERS
from caddf.errors import InputError
from caddf.evaluation import EvaluationConfig
from caddf.experiment import METHODS
from caddf.model_settings import ModelSettings
from caddf.running import ValidationSettings
from caddf.settings import add_choices, add_options, add_section, documented, new_parser, options, parse, section
from caddf.training import TrainConfig


@dataclass(frozen=True)
class Oven:
    """How it is baked.

    Some words before: they are of no field.

    heat: of the oven, in kelvin; it
        is high. shelf, door: where `heat` goes.
    fan: what turns. fuel: what burns. hours: of baking.
    """

    heat: float = 450.0
    shelf: int | None = None
    door: Literal["open", "shut"] = "shut"
    fan: bool = False
    hours: tuple[int, ...] = (1, 2)
    fuel: Literal["gas"] = "gas"


@dataclass(frozen=True)
class Grill:
    """Bars.

    heat: of the coals.
    """

    heat: float = 900.0


def oven_parser():
    parser = new_parser("bake", "[OPTIONS]", "about baking")
    add_section(parser, "oven", Oven, {"heat": 500.0}, skip=("fan",))
    return parser


def test_documented_reads_labels_at_line_starts_and_after_full_stops():
    assert documented(Oven) == {
        "heat": "of the oven, in kelvin; it is high",
        "shelf": "where heat goes",
        "door": "where heat goes",
        "fan": "what turns",
        "fuel": "what burns",
        "hours": "of baking",
    }


@pytest.mark.parametrize(
    "settings",
    [
        ModelSettings,
        TrainConfig,
        ValidationSettings,
        EvaluationConfig,
        *dict.fromkeys(m.settings for m in METHODS.values()),
        *DECODERS.values(),
    ],
)
def test_every_setting_is_explained(settings):
    assert documented(settings).keys() == {field.name for field in fields(settings)}


def test_section_has_the_fields_types_and_defaults():
    assert section(Oven, parse(oven_parser(), ["--oven.shelf", "3"]).oven) == Oven(500.0, 3)
    with pytest.raises(InputError, match=r"no setting --oven\.fan"):
        parse(oven_parser(), ["--oven.fan", "true"])


def test_options_are_flat_and_leave_out_what_is_not_set():
    parser = new_parser("bake", "[OPTIONS]", "about baking")
    add_options(parser, Oven)
    assert options(Oven, parse(parser, ["--hours", "3"])) == {
        "heat": 450.0,
        "door": "shut",
        "fan": False,
        "hours": (3,),
        "fuel": "gas",
    }


def test_choices_share_names_and_leave_defaults_to_each():
    parser = new_parser("bake", "[OPTIONS]", "about baking")
    add_choices(parser, "of some", {"oven": Oven, "grill": Grill}, skip=("fan",))
    assert options(Oven, parse(parser, [])) == {}
    assert options(Grill, parse(parser, ["--heat", "7"])) == {"heat": 7.0}
    text = " ".join(parser.format_help().split())
    assert "--heat FLOAT of the oven, in kelvin; it is high [oven]; of the coals [grill]" in text
    assert "--shelf INT where heat goes [oven]" in text


def test_help_has_every_text_and_default():
    text = " ".join(oven_parser().format_help().split())
    assert text.startswith("usage: bake [OPTIONS] about baking")
    assert "oven: How it is baked:" in text
    assert "--oven.heat FLOAT of the oven, in kelvin; it is high (default: 500.0)" in text
    assert "--oven.shelf INT where heat goes --oven.door {open,shut} where heat goes (default: shut)" in text
    assert "--oven.hours INT,... of baking (default: 1,2)" in text


@pytest.mark.parametrize(("given", "read"), [("3", (3,)), ("4,5", (4, 5)), ("[4, 5]", (4, 5)), ("", ())])
def test_lists_are_written_with_commas(given, read):
    assert parse(oven_parser(), ["--oven.hours", given]).oven.hours == read
    assert parse(oven_parser(), []).oven.hours == (1, 2)


@dataclass(frozen=True)
class Stove(Oven):
    """An oven with plates.

    heat: of the plates.
    """

    plates: int = 4


def test_what_extends_a_class_is_explained_by_it_too():
    assert documented(Stove) == {**documented(Oven), "heat": "of the plates"}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--oven.heat", "hot"], "oven.heat is hot; it must be a number"),
        (["--oven.heat", "nan"], "oven.heat is nan; it must be a number"),
        (["--oven.shelf", "1.5"], "oven.shelf is 1.5; it must be a whole number"),
        (["--oven.door", "ajar"], "oven.door is ajar; it must be one of open, shut"),
        (["--oven.fuel", "wood"], "oven.fuel is wood; it must be gas"),
        (["--oven.hours", "4,x"], "oven.hours is 4,x; it must be whole numbers, as in 1,8"),
        (["--oven.hours", "1.5"], "oven.hours is 1.5; it must be whole numbers, as in 1,8"),
        (["--oven.lamp", "1"], "there is no setting --oven.lamp; bake --help explains every setting"),
        (["--oven.dor=ajar"], "there is no setting --oven.dor (did you mean --oven.door?); bake --help explains every"
         " setting"),
        (["--heat", "1"], "there is no setting --heat (did you mean --oven.heat?); bake --help explains every setting"),
        (["--ovn.heat", "1"], "there is no setting --ovn.heat (did you mean --oven.heat?); bake --help explains every"
         " setting"),
        (["--oven.heat"], "--oven.heat is given without a value (one that begins with a dash follows =, as in"
         " --oven.heat=-1); bake --help explains every setting"),
    ],
)  # fmt: skip
def test_errors_are_sentences(arguments, sentence):
    with pytest.raises(InputError) as error:
        parse(oven_parser(), arguments)
    assert str(error.value) == sentence
