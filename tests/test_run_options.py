"""A run's settings from files and options, without a run; `test_cli.py` has what is refused, and runs that start."""

import pytest

from caddf.errors import InputError
from caddf.experiment import DEFAULT_METHOD, METHODS
from caddf.run_options import Given, add_sections, parse_given, read_given, run_settings
from caddf.settings import new_parser


def settings_of(*arguments):
    """Of the options that every run has, those that these tests set."""
    given = read_given(list(arguments))
    parser = new_parser("caddf train", "[OPTIONS]", "about training")
    for name, kind, default in (
        ("data", str, "set"), ("init_from", str | None, None), ("device", str, "cpu"), ("dtype", str, "float32"),
        ("seed", int, 0),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=kind, default=default)
    add_sections(parser, given.method)
    return run_settings(given.method, parse_given(parser, given))


def test_methods_and_files_are_read_before_the_options(tmp_path):
    one, other = tmp_path / "one.yaml", tmp_path / "other.yaml"
    one.write_text("method: mdlm\ntrain: {steps: 3}\nsome: [1, 8]\nmodel: {causal: off}")
    other.write_text("seed: 1e3")
    assert read_given([]) == Given(DEFAULT_METHOD, [], [])
    assert read_given(["--seed", "1", "--method=gpt2", "--out", "x"]) == Given(
        "gpt2", [], ["--seed", "1", "--out", "x"]
    )
    # Whether there are such settings is not asked yet.
    in_one = {"train.steps": "3", "some": "1,8", "model.causal": "off"}
    files = ["--config", str(one), f"--config={other}"]
    assert read_given(files) == Given("mdlm", [(str(one), in_one), (str(other), {"seed": "1e3"})], [])
    assert read_given([*files, "--method", "gpt2"]).method == "gpt2"
    assert read_given([*files, "--config", "gpt2"]).method == "gpt2"


def test_the_last_file_and_then_the_command_line_have_the_last_word(tmp_path):
    for name, text in (("one", "seed: 1\ntrain: {steps: 1, clip: 2}"), ("other", "train: {steps: 2}")):
        (tmp_path / name).write_text(text)
    files = ["--config", str(tmp_path / "one"), "--config", str(tmp_path / "other")]
    settings = settings_of("--train.clip", "3", *files)
    assert (settings.seed, settings.train.steps, settings.train.clip) == (1, 2, 3)


@pytest.mark.parametrize("method", METHODS)
def test_without_options_a_run_has_its_methods_defaults(method):
    settings = settings_of("--config", method)
    assert settings.method == method
    assert settings.objective == METHODS[method].settings(**METHODS[method].defaults)


def test_a_setting_of_another_method_is_refused():
    with pytest.raises(InputError, match="distill is set, but the method mdlm has no such setting; its objective has"):
        settings_of("--config", "mdlm", "--objective.distill", "1")
