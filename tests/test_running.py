"""A run from its settings: what is checked before its folder is made, and what it needs to go on."""

import dataclasses
import errno

import pytest
import torch
import yaml
from rich.console import Console

import caddf.checkpoint
from caddf import InputError, load
from caddf.checkpoint import locked
from caddf.data import prepare
from caddf.experiment import METHODS
from caddf.model_settings import ModelSettings
from caddf.objectives import SynergisticConfig
from caddf.running import SETTINGS, RunSettings, ValidationSettings, resume, start
from caddf.training import TrainConfig

QUIET = Console(quiet=True)
SHORT = TrainConfig(steps=2, batch_size=2, tensorboard=False, sample_every=0)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepare_set(tmp_path_factory.mktemp("running") / "set", "one two three four five. ")


def prepare_set(out, words, **settings):
    text = out.with_suffix(".txt")
    text.write_text(words * 40)
    return prepare(out, train=text, validation=text, tokenizer="bytes", **settings).folder


def settings_for(data, **values):
    given = {"model": ModelSettings(size="debug"), "objective": SynergisticConfig(), "train": SHORT}
    return RunSettings(str(data), **given | {"device": "cpu", "dtype": "float32"} | values)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    run = tmp_path_factory.mktemp("running") / "run"
    assert start(settings_for(data), run, QUIET).step == 2
    return run


def test_settings_are_read_as_they_were_saved(data, tmp_path):
    settings = settings_for(data, seed=7, dtype="float64", validation=ValidationSettings("causal", 3))
    settings.save(tmp_path)
    again = RunSettings.load(tmp_path)
    assert again == settings
    assert (again.train.seed, again.train.precision, again.train.device) == (7, "fp64", "cpu")
    assert {"seed", "precision", "device"}.isdisjoint(yaml.safe_load((tmp_path / SETTINGS).read_text())["train"])


def test_block_diffusions_blocks_are_its_models(data, tmp_path):
    """Runs that have a block size for the objective are read where it is the model's, and else refused."""
    settings = settings_for(data, method="bd3lm", objective=METHODS["bd3lm"].settings(beta=0.3))
    settings.save(tmp_path)
    saved = (tmp_path / SETTINGS).read_text()
    (tmp_path / SETTINGS).write_text(saved.replace("beta: 0.3\n", "beta: 0.3\n  block_size: null\n"))
    assert RunSettings.load(tmp_path) == settings
    (tmp_path / SETTINGS).write_text(saved.replace("beta: 0.3\n", "beta: 0.3\n  block_size: 4\n"))
    with pytest.raises(InputError, match=r"does not fit this version: .* 'block_size'"):
        RunSettings.load(tmp_path)


@pytest.mark.parametrize("text", ["a: : b", "- 1", "", "data: d\nmethod: none", "data: d\nmethod: caddf-t-dce\nx: 1"])
def test_settings_of_another_version_are_refused(tmp_path, text):
    (tmp_path / SETTINGS).write_text(text)
    with pytest.raises(InputError, match="does not fit this version"):
        RunSettings.load(tmp_path)


def test_what_is_no_run_cannot_be_resumed(tmp_path):
    with pytest.raises(InputError, match=r"is no run: it has no config\.yaml; start one with caddf train --out"):
        resume(tmp_path, QUIET)


def test_a_finished_run_is_finished(run):
    result = resume(run, QUIET)
    assert result.finished_before and result.step == 2
    assert load(run).about["method"] == "caddf-lambda-dce"


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"data": "nowhere"}, "nowhere is no token set"),
        ({"device": "cuda"}, "device is cuda, which this machine does not have"),
        ({"model": ModelSettings(size="debug", context=5000)}, "5000"),
        ({"model": ModelSettings(size="debug", block_size=33)}, "block_size is 33"),
        ({"init_from": "nowhere"}, "nowhere does not exist"),
        (
            {"model": ModelSettings(size="debug", causal="off"), "validation": ValidationSettings("block")},
            r"validation\.likelihood is block; this model has diffusion",
        ),
    ],
)
def test_nothing_is_made_of_settings_that_do_not_fit(data, tmp_path, values, sentence):
    given = {"data": data} | values
    if values.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has the device")
    with pytest.raises(InputError, match=sentence):
        start(settings_for(**given), tmp_path / "run", QUIET)
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_not_written_over(data, run):
    before = (run / SETTINGS).read_bytes()
    with pytest.raises(InputError, match="exists; give a new folder, or go on with caddf train --resume"):
        start(settings_for(data), run, QUIET)
    assert (run / SETTINGS).read_bytes() == before


def test_a_run_is_one_process_at_a_time(run):
    with locked(run), pytest.raises(InputError, match="is being written by another process; let it end, or stop it"):
        resume(run, QUIET)
    assert resume(run, QUIET).finished_before


def test_a_full_disk_leaves_no_run_behind(data, tmp_path, monkeypatch):
    def full(*arguments, **settings):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(caddf.checkpoint, "save_file", full)
    with pytest.raises(InputError, match="no space left while saving"):
        start(settings_for(data), tmp_path / "run", QUIET)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_later_leaves_what_was_saved(data, tmp_path, monkeypatch):
    save, calls = caddf.checkpoint.save_file, []

    def full_at_step_2(*arguments, **settings):
        calls.append(arguments)
        if len(calls) > 4:  # model and training state of the steps 0 and 1
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(*arguments, **settings)

    train = dataclasses.replace(SHORT, checkpoint_every=1, evaluate_every=0)
    whole = start(settings_for(data, train=train), tmp_path / "whole", QUIET)
    with monkeypatch.context() as patch:
        patch.setattr(caddf.checkpoint, "save_file", full_at_step_2)
        with pytest.raises(InputError, match=r"no space left while saving .*; free some and resume"):
            start(settings_for(data, train=train), tmp_path / "run", QUIET)
    again = resume(tmp_path / "run", QUIET)
    assert (again.checkpoint / "model.safetensors").read_bytes() == (
        whole.checkpoint / "model.safetensors"
    ).read_bytes()


def test_a_run_killed_before_its_first_checkpoint_starts_anew(data, run, tmp_path):
    killed = tmp_path / "run"
    killed.mkdir()
    for name in (SETTINGS, "data.json"):
        (killed / name).write_bytes((run / name).read_bytes())
    result = resume(killed, QUIET)
    weights = "checkpoints/latest/model.safetensors"
    assert result.step == 2 and (killed / weights).read_bytes() == (run / weights).read_bytes()


def test_a_run_does_not_go_on_with_other_data(tmp_path):
    data = prepare_set(tmp_path / "set", "these are the words. ")
    start(settings_for(data), tmp_path / "run", QUIET)
    prepare_set(tmp_path / "set", "these are other ones. ", overwrite=True)
    with pytest.raises(InputError, match=r"is not the data that .* was started on; its tokens have changed"):
        resume(tmp_path / "run", QUIET)


def test_a_run_goes_on_where_its_data_was_moved(tmp_path):
    data = prepare_set(tmp_path / "set", "these are the words. ")
    start(settings_for(data), tmp_path / "run", QUIET)
    (tmp_path / "set").rename(tmp_path / "moved")
    with pytest.raises(InputError, match="set is no token set"):
        resume(tmp_path / "run", QUIET)
    assert resume(tmp_path / "run", QUIET, data=str(tmp_path / "moved"), device="cpu").finished_before
    kept = RunSettings.load(tmp_path / "run")
    assert kept.data == str(tmp_path / "moved") and kept.device == kept.train.device == "cpu"
    other = prepare_set(tmp_path / "other", "these are other ones. ")
    with pytest.raises(InputError, match="is not the data that"):
        resume(tmp_path / "run", QUIET, data=str(other))
    assert RunSettings.load(tmp_path / "run") == kept


def test_weights_come_from_another_run_and_are_not_read_again(data, run, tmp_path, monkeypatch):
    source = tmp_path / "source"
    load(run).save_pretrained(source)
    monkeypatch.chdir(tmp_path)
    train = dataclasses.replace(SHORT, evaluate_every=0)
    start(settings_for(data, init_from="source", train=train), tmp_path / "run", QUIET)
    assert RunSettings.load(tmp_path / "run").init_from == str(source)
    source.rename(tmp_path / "gone")
    assert resume(tmp_path / "run", QUIET).finished_before


@pytest.mark.parametrize("likelihood", ["auto", "causal", "block", "diffusion"])
def test_each_validation_measures_nats_per_token(data, tmp_path, likelihood):
    validation = ValidationSettings(likelihood, windows=2, samples=1)
    result = start(settings_for(data, validation=validation), tmp_path / "run", QUIET)
    assert 4 < result.best_nll < 7  # log 257 is 5.55, and two steps teach little


@pytest.mark.parametrize("method", METHODS)
def test_two_branches_train_without_the_causal_one_and_other_methods_refuse_the_choice(data, tmp_path, method):
    model = ModelSettings(size="debug", causal="off")
    objective = METHODS[method].settings(**METHODS[method].defaults)
    settings = settings_for(data, method=method, model=model, objective=objective)
    if method.startswith("caddf"):
        assert start(settings, tmp_path / "r", QUIET).step == 2
    else:
        with pytest.raises(InputError, match=r"model\.causal is off, which this method's network does not have"):
            start(settings, tmp_path / "r", QUIET)
