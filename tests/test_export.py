"""What is shipped: rounded weights are read as exactly the numbers they stand for, and the card says what they are."""

import dataclasses
import json
import shlex
import shutil
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import nn

import caddf
from caddf.checkpoint import SCALES, load_state, restored, rounded, save_model
from caddf.cli import main
from caddf.errors import InputError
from caddf.experiment import METHODS
from caddf.export import ExportSettings, export, training_command
from caddf.model_settings import ModelSettings
from caddf.quantise import WEIGHT_LEVELS, integers
from caddf.running import RunSettings, start
from caddf.training import TrainConfig

SHIPPED = sorted((Path(__file__).parent.parent / "checkpoints").glob("*/config.json"))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A small run, its data, and an evaluation of it."""
    folder = tmp_path_factory.mktemp("export")
    text = "".join(f"Line {i} of a text that repeats itself, {i % 5} times.\n\n" for i in range(300))
    (folder / "text.txt").write_text(text)
    caddf_data = ["data", "prepare", "--input", str(folder / "text.txt"), "--tokenizer", "bpe:400"]
    assert main([*caddf_data, "--out", str(folder / "data")]) == 0
    method = METHODS["caddf-lambda-dce"]
    settings = RunSettings(
        data=str(folder / "data"),
        device="cpu",
        seed=3,
        model=ModelSettings("debug", block_size=4),
        objective=method.settings(**method.defaults),
        train=TrainConfig(steps=12, batch_size=4, sample_every=0, tensorboard=False),
    )
    start(settings, folder / "run", Console(quiet=True))
    evaluated = caddf.evaluate(caddf.load(folder / "run"), folder / "data", split="test")
    values = {"model": str(folder / "run"), "data": str(folder / "data"), "split": "test", **evaluated}
    (folder / "evaluation.json").write_text(json.dumps(values))
    return folder


# The numbers.


def some_state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    matrix = torch.randn(7, 33) * torch.logspace(-6, 4, 7)[:, None]
    matrix[3] = 0.0
    return {"matrix": matrix, "bias": torch.randn(7), "ids": torch.arange(5)}


def test_int8_is_the_nearest_of_its_numbers_and_is_read_bit_for_bit():
    state = some_state()
    kept = rounded(state, "int8")
    assert {name: tensor.dtype for name, tensor in kept.items()} == {
        "matrix": torch.int8,
        "matrix" + SCALES: torch.float32,
        "bias": torch.float32,
        "ids": torch.int64,
    }
    integers, scales = kept["matrix"], kept["matrix" + SCALES]
    assert integers.abs().amax(1).tolist() == [WEIGHT_LEVELS] * 3 + [0] + [WEIGHT_LEVELS] * 3
    read = restored(Path("x"), kept)
    assert read.keys() == state.keys()
    by_hand = [[float(i) * float(s) for i in row] for row, s in zip(integers, scales, strict=True)]
    assert torch.equal(read["matrix"], torch.tensor(by_hand, dtype=torch.float64).float())
    assert ((read["matrix"] - state["matrix"]).abs() <= 0.5001 * scales[:, None]).all()
    assert torch.equal(read["bias"], state["bias"]) and torch.equal(read["ids"], state["ids"])


def test_rounding_what_was_rounded_changes_nothing():
    for weights in ("bfloat16", "int8"):
        once = restored(Path("x"), rounded(some_state(), weights))
        twice = restored(Path("x"), rounded(once, weights))
        assert all(torch.equal(once[name].float(), twice[name].float()) for name in once)


def test_int8_inference_has_the_integers_that_are_shipped():
    read = restored(Path("x"), kept := rounded(some_state(), "int8"))
    assert torch.equal(integers(read["matrix"])[0], kept["matrix"])


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
def test_a_module_gets_the_numbers_on_disk_in_its_own_type(tmp_path, weights, kind):
    torch.manual_seed(0)
    model, dtype = nn.Linear(9, 4), getattr(torch, kind)
    save_model(tmp_path, rounded(model.state_dict(), weights), {"model": {}})
    load_state(other := nn.Linear(9, 4).to(dtype), tmp_path)
    kept = load_file(tmp_path / "model.safetensors")
    numbers = kept["weight"].float()
    if weights == "int8":
        numbers = numbers * kept["weight" + SCALES][:, None]
    assert torch.equal(other.weight, numbers.to(dtype)) and torch.equal(other.bias, kept["bias"].to(dtype))
    if weights == "bfloat16":
        assert torch.equal(kept["weight"], model.weight.bfloat16())


@pytest.mark.parametrize("scales", [None, torch.ones(3), torch.ones(4, dtype=torch.float64), torch.ones(4, 1)])
def test_int8_without_its_scales_is_refused(tmp_path, scales):
    tensors = {"weight": torch.ones(4, 9, dtype=torch.int8), "bias": torch.zeros(4)}
    if scales is not None:
        tensors["weight" + SCALES] = scales
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"model\.safetensors holds weight in int8 and no float32 scale for each row"):
        load_state(nn.Linear(9, 4), tmp_path)


# The folder.


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
def test_an_exported_model_is_the_run_but_for_rounding(place, tmp_path, weights):
    run = caddf.load(place / "run")
    shipped = caddf.load(export(str(place / "run"), ExportSettings(str(tmp_path / "model"), weights)))
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert {**shipped.about, "stages": None} == {**run.about, "stages": None}
    assert shipped.tokenizer.fingerprint == run.tokenizer.fingerprint
    expected = restored(Path("x"), rounded(run.model.state_dict(), weights))
    for name, tensor in shipped.model.state_dict().items():
        assert torch.equal(tensor, expected[name].to(tensor.dtype)), name
    ppl, near = (
        caddf.evaluate(model, place / "data", split="test")["likelihoods"]["block"]["ppl"] for model in (run, shipped)
    )
    # Perplexity moves by no more than a weight may: half a unit in the last place.
    assert abs(near / ppl - 1) < {"float32": 1e-12, "bfloat16": 2**-8, "int8": 1 / 254}[weights]
    sizes = {"float32": 4, "bfloat16": 2, "int8": 1.2}
    parameters = run.model.parameter_counts()["total"]
    overhead = 64 * 1024  # names, shapes, and in int8 all that is no matrix
    assert (tmp_path / "model" / "model.safetensors").stat().st_size <= sizes[weights] * parameters + overhead
    again = tmp_path / "again"
    shipped.save_pretrained(again)
    assert all(torch.equal(a, b) for a, b in zip(
        caddf.load(again).model.state_dict().values(), shipped.model.state_dict().values(), strict=True))  # fmt: skip


def test_int8_can_be_read_for_int8_inference(place, tmp_path):
    out = export(str(place / "run"), ExportSettings(str(tmp_path / "model"), "int8"))
    whole, small = caddf.load(out).model.state_dict(), caddf.load(out, quantize="int8").model.state_dict()
    assert any(tensor.ndim == 2 for tensor in whole.values())
    for name, tensor in whole.items():
        torch.testing.assert_close(small[name], tensor, rtol=1e-6, atol=0)


def test_the_card_says_what_is_known(place, tmp_path):
    arguments = ["export", str(place / "run"), "--out", str(tmp_path / "a-name"), "--dtype", "int8"]
    arguments += ["--evaluations", str(place / "evaluation.json"), "--data", str(place / "data"), "--windows", "4"]
    assert main([*arguments, "--data-licence", "public domain", "--note", "Trained for a test."]) == 0
    card = (tmp_path / "a-name" / "README.md").read_text()
    assert card.startswith("---\n") and card.endswith("\n") and "\n# a-name\n\nTrained for a test.\n" in card
    manifest = json.loads((place / "data" / "manifest.json").read_text())["splits"]["train"]
    evaluated = json.loads((place / "evaluation.json").read_text())["likelihoods"]
    block, diffusion = evaluated["block"], evaluated["diffusion"]
    for said in (
        "`caddf-lambda-dce`: lambda-dce",
        "`debug`, ",
        "int8 with a float32 scale for each output",
        f"{manifest['tokens']:,} tokens",
        "licence: public domain |",
        "12 steps, 1,536 tokens",
        f"| block | {block['ppl']:.2f} ± {block['ppl'] * block['standard_error']:.2f} | {block['nll']:.4f} |",
        f"| diffusion, bound | {diffusion['ppl']:.2f} ±",
        "## What int8 changes",
        "caddf train --config caddf-lambda-dce --data data --out RUN1 --seed 3 ",
        "licence of the weights | not stated |",
    ):
        assert said in card, said
    assert "truncated" not in card and str(place) not in card
    again = export(str(tmp_path / "a-name"), ExportSettings(str(tmp_path / "again"), data_licence="public domain"))
    facts = [line for line in card.splitlines() if line.startswith(("| training", "| validation"))]
    assert len(facts) == 3 and set(facts) <= set((again / "README.md").read_text().splitlines())
    assert main([*arguments]) == 2
    assert main([*arguments, "--overwrite"]) == 0
    assert "Trained for a test." not in (tmp_path / "a-name" / "README.md").read_text()


def test_the_training_command_starts_the_same_run(place, tmp_path, monkeypatch):
    command = shlex.split(training_command(RunSettings.load(place / "run")))
    monkeypatch.chdir(place)
    command[command.index("RUN")] = str(tmp_path / "run")
    assert main([*command[1:], "--device", "cpu"]) == 0
    one, other = (caddf.load(run).model.state_dict() for run in (place / "run", tmp_path / "run"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_card_names_the_run_that_a_run_started_from(place, tmp_path):
    parameters = sum(each.numel() for each in caddf.load(place / "run").model.causal.parameters())
    causal = RunSettings(
        data=str(place / "data"),
        method="gpt2",
        device="cpu",
        model=ModelSettings("debug", block_size=4, match=parameters, token_shift=True),
        objective=METHODS["gpt2"].settings(),
        train=TrainConfig(steps=7, batch_size=2, sample_every=0, tensorboard=False),
    )
    start(causal, tmp_path / "first", Console(quiet=True))
    settings = dataclasses.replace(RunSettings.load(place / "run"), init_from=str(tmp_path / "first"))
    start(settings, tmp_path / "second", Console(quiet=True))
    card = (export(str(tmp_path / "second"), ExportSettings(str(tmp_path / "model"))) / "README.md").read_text()
    commands = [line.strip() for line in card.splitlines() if line.strip().startswith("caddf train")]
    assert [shlex.split(command)[shlex.split(command).index("--out") + 1] for command in commands] == ["RUN1", "RUN2"]
    assert "--config gpt2" in commands[0] and "--init_from RUN1" in commands[1]
    assert "that has read 1,984 tokens" in card and "RUN1: 7 steps, 448 tokens" in card
    assert "12 steps, 1,536 tokens" in card and str(tmp_path) not in card

    # An exported model knows it still, when its run is gone.
    shutil.rmtree(tmp_path / "first")
    shutil.rmtree(tmp_path / "second")
    settings = dataclasses.replace(settings, init_from=str(tmp_path / "model"))
    start(settings, tmp_path / "third", Console(quiet=True))
    card = (export(str(tmp_path / "third"), ExportSettings(str(tmp_path / "last"))) / "README.md").read_text()
    assert [line.strip() for line in card.splitlines() if line.strip().startswith("caddf train")][:2] == commands
    assert "--init_from RUN2" in card and "that has read 3,520 tokens" in card and "RUN2: 12 steps" in card


def test_a_folder_that_is_no_run_is_exported_without_its_training(place, tmp_path):
    caddf.load(place / "run").save_pretrained(tmp_path / "model")
    out = export(str(tmp_path / "model"), ExportSettings(str(tmp_path / "shipped")))
    card = (out / "README.md").read_text()
    assert "Trained with" not in card and "steps" not in card and "| training data | not stated |" in card


def test_what_cannot_be_exported_is_said_and_leaves_nothing(place, tmp_path):
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(InputError, match=r"other\.json, without likelihoods"):
        export(str(place / "run"), ExportSettings(str(tmp_path / "m"), evaluations=(str(tmp_path / "other.json"),)))
    with pytest.raises(InputError, match="windows is 0"):
        export(str(place / "run"), ExportSettings(str(tmp_path / "m"), windows=0))
    with pytest.raises(InputError, match=r"out is .*run, which exists"):
        export(str(place / "run"), ExportSettings(str(place / "run")))
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("config", SHIPPED, ids=lambda path: path.parent.name)
def test_what_is_shipped_is_small_and_loads_at_once(config):
    """The fastest of three, since other work on the machine only ever slows it down."""
    folder, seconds = config.parent, []
    assert (folder / "model.safetensors").stat().st_size <= 40_000_000
    for _ in range(3):
        begun = time.perf_counter()
        caddf.load(folder)
        seconds.append(time.perf_counter() - begun)
    assert min(seconds) < 2
    assert {"README.md", "tokenizer.json"} <= {path.name for path in folder.iterdir()}


def test_only_a_model_folder_is_replaced(place, tmp_path, capsys):
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "thesis.tex").write_text("years of work")
    for out in (notes, place / "run", place / "run" / "checkpoints", place / "text.txt"):
        assert main(["export", str(place / "run"), "--out", str(out), "--overwrite"]) == 2
        assert "exists and holds other things than a model" in capsys.readouterr().err
    assert (notes / "thesis.tex").read_text() == "years of work" and (place / "run" / "checkpoints").is_dir()


def test_another_models_perplexities_are_refused(place, tmp_path):
    values = json.loads((place / "evaluation.json").read_text())
    for name, other in (("parameters", 7), ("tokenizer", "another")):
        (tmp_path / "other.json").write_text(json.dumps({**values, name: other}))
        with pytest.raises(InputError, match=f"other.json, which is of another model: its {name} is {other}"):
            export(str(place / "run"), ExportSettings(str(tmp_path / "m"), evaluations=(str(tmp_path / "other.json"),)))
    assert {"parameters", "tokenizer"} <= values.keys() and not (tmp_path / "m").exists()
