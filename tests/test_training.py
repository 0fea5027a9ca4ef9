"""Resumed is uninterrupted, bit for bit; whatever happens, what is on disk is whole."""

import dataclasses
import itertools
import json
import math
import multiprocessing
import os
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from caddf.checkpoint import load_model_config, load_state, load_tensors
from caddf.data.loader import Position
from caddf.errors import InputError
from caddf.models.backbone import DualBranch
from caddf.models.config import BranchConfig, ModelConfig, Preset
from caddf.objectives import AutoregressiveLoss, Loss, Synergistic, SynergisticConfig
from caddf.training import TrainConfig, TrainingError, ema, train
from caddf.training.optimizer import build_optimizer, learning_rate_at

BRANCH = BranchConfig(1, 16, 2)
MODEL = ModelConfig(12, 8, BRANCH, BRANCH, block_size=4)
PRESET = Preset(BRANCH, BRANCH, 8, 4, 6, 2, 1e-2, "bytes")


def settings(**values):
    given = {"device": "cpu", "precision": "fp32", "log_every": 1, "checkpoint_every": 3, "tensorboard": False}
    return TrainConfig(**given | values).resolved(PRESET)


class Rows:
    """Rows that depend on the position alone, sharded over the processes."""

    def __init__(self, rows):
        self.rows = rows

    def take(self, position, rank=0, world=1):
        generator = torch.Generator().manual_seed(position.offset)
        tokens = torch.randint(MODEL.vocab_size, (self.rows, MODEL.context), generator=generator)
        return tokens[rank::world], Position(position.epoch, position.offset + 1)


class AtUpdate:
    """The mixture, with something that happens in the first pass of update `step`, once."""

    def __init__(self, step=0, act=None, accumulation=1):
        self.mixture = Synergistic(SynergisticConfig(), MODEL.block_size)
        self.left, self.act = (step - 1) * accumulation, act

    def __call__(self, model, x0, generator):
        loss = self.mixture(model, x0, generator)
        self.left -= 1
        if self.act and self.left == -1:
            return self.act(loss) or loss
        return loss


def new_model():
    torch.manual_seed(0)
    return DualBranch(MODEL)


def smooth_loss(model):
    """Something to validate by that depends on the weights."""
    with torch.no_grad():
        return float(sum(p.double().square().sum() for p in model.parameters()))


def run_training(run, config, objective=None, model=None, **options):
    options.setdefault("console", Console(quiet=True))
    describe = {"method": "caddf-lambda-dce", "model": MODEL.to_dict()}
    batches = Rows(config.rows_per_pass)
    return train(run, model or new_model(), objective or AtUpdate(), batches, config, describe=describe, **options)


def contents(folder):
    """All that a checkpoint holds, but for the times."""
    progress = json.loads((folder / "training.json").read_text())
    progress.pop("elapsed")
    progress["recent"].pop("seconds", None)
    tensors = {name: load_tensors(folder / f"{name}.safetensors") for name in ("model", "training")}
    return progress, tensors


def assert_same(one, other):
    (progress, tensors), (progress_too, tensors_too) = contents(one), contents(other)
    assert progress == progress_too
    for file in tensors:
        assert tensors[file].keys() == tensors_too[file].keys()
        for name, tensor in tensors[file].items():
            assert tensor.dtype == tensors_too[file][name].dtype
            assert torch.equal(tensor, tensors_too[file][name]), name


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def untimed(run):
    return [{k: v for k, v in row.items() if k not in ("elapsed", "tokens_per_second")} for row in rows(run)]


def stop(_):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"batch_size": 4, "accumulation": 2, "log_every": 4},
        {"precision": "bf16", "ema": 0.0},
        {"precision": "fp64", "clip": 0.0, "weight_decay": 0.0},
        {"optimizer": "muon"},
    ],
    ids=["plain", "accumulation", "bf16", "fp64", "muon"],
)
@pytest.mark.parametrize("killed_at", [4, 6])
def test_resumed_equals_uninterrupted(tmp_path, values, killed_at):
    config = settings(**values)
    straight = run_training(tmp_path / "straight", config, validate=smooth_loss)
    with pytest.raises(KeyboardInterrupt):
        broken = AtUpdate(killed_at, stop, config.accumulation)
        run_training(tmp_path / "run", config, broken, validate=smooth_loss)
    other = DualBranch(MODEL)  # what it holds must not matter
    resumed = run_training(tmp_path / "run", config, model=other, validate=smooth_loss, resume=True)
    assert resumed.step == straight.step == 6 and not resumed.finished_before
    assert_same(resumed.checkpoint, straight.checkpoint)
    assert untimed(tmp_path / "run") == untimed(tmp_path / "straight")


def test_training_changes_every_parameter_and_learns(tmp_path):
    before, model = new_model(), new_model()
    config = settings(steps=40, checkpoint_every=40, learning_rate=1e-2, ema=0.0)

    class OneBatch(Rows):
        def take(self, position, rank=0, world=1):
            return super().take(Position())[0], position

    describe = {"model": MODEL.to_dict()}
    train(tmp_path, model, AtUpdate(), OneBatch(4), config, describe=describe, console=Console(quiet=True))
    for (name, old), new in zip(before.named_parameters(), model.parameters(), strict=True):
        assert not torch.equal(old, new), name
    curve = [row["parts"]["block"] for row in rows(tmp_path) if "block" in row["parts"]]
    assert curve[-1] < curve[0] - 1 and curve[0] == pytest.approx(math.log(12), abs=0.2)


def _killed_while_saving(run):
    """In a process of its own: dies by SIGKILL with the checkpoint of step 6 half-written."""
    torch.set_num_threads(1)
    import caddf.training.state as state

    save, count = state.save_tensors, iter(range(9))

    def save_and_die(path, tensors, metadata=None):
        save(path, tensors, metadata)
        if next(count) == 2:  # after those of steps 0 and 3
            os.kill(os.getpid(), signal.SIGKILL)

    state.save_tensors = save_and_die
    run_training(run, settings())


def test_sigkill_while_saving_leaves_the_last_checkpoint(tmp_path):
    child = multiprocessing.get_context("spawn").Process(target=_killed_while_saving, args=(tmp_path / "run",))
    child.start()
    child.join(120)
    assert child.exitcode == -signal.SIGKILL
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in folder.glob("step-*")) == ["step-00000000", "step-00000003"]
    assert list(folder.glob(".*.tmp"))
    resumed = run_training(tmp_path / "run", settings(), resume=True)
    assert not list(folder.glob(".*"))
    assert_same(resumed.checkpoint, run_training(tmp_path / "straight", settings()).checkpoint)


def _one_of_two_processes(rank, port, folder):
    """An uninterrupted run, a killed and resumed one, and one of a loss that draws nothing."""
    torch.set_num_threads(1)
    where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in where.items()} | {"MASTER_ADDR": "127.0.0.1"}
    config = settings(precision="fp64", accumulation=2)
    run_training(folder / "straight", config, validate=smooth_loss)
    with pytest.raises(KeyboardInterrupt):
        run_training(folder / "run", config, AtUpdate(5, stop, 2), validate=smooth_loss)
    run_training(folder / "run", config, validate=smooth_loss, resume=True)
    run_training(folder / "ar", config, AutoregressiveLoss())


def test_two_processes(tmp_path):
    """Resumed is uninterrupted there too; and two processes with half of the rows each are one (float64)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    children = [context.Process(target=_one_of_two_processes, args=(rank, port, tmp_path)) for rank in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
    assert [child.exitcode for child in children] == [0, 0]
    latest = Path("checkpoints", "step-00000006")
    assert_same(tmp_path / "run" / latest, tmp_path / "straight" / latest)
    assert untimed(tmp_path / "run") == untimed(tmp_path / "straight")
    assert len(load_tensors(tmp_path / "run" / latest / "training.safetensors")["generators"]) == 2

    config = settings(precision="fp64", accumulation=2)
    alone = run_training(tmp_path / "alone", config, AutoregressiveLoss())
    one, two = (load_tensors(folder / "model.safetensors") for folder in (alone.checkpoint, tmp_path / "ar" / latest))
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=0, atol=1e-9)
    with pytest.raises(InputError, match="was saved by 2 processes; 1 cannot resume it"):
        run_training(tmp_path / "run", settings(precision="fp64", steps=8), resume=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_and_saves(tmp_path, number):
    before = signal.getsignal(number)
    with (tmp_path / "log").open("w") as file:
        console = Console(file=file)
        kill = AtUpdate(2, lambda _: os.kill(os.getpid(), number))
        result = run_training(tmp_path / "run", settings(), kill, console=console)
    assert result.interrupted and result.step == 2 and result.checkpoint.name == "step-00000002"
    assert f"caddf train --resume {tmp_path / 'run'}" in (tmp_path / "log").read_text()
    assert signal.getsignal(number) is before
    resumed = run_training(tmp_path / "run", settings(), resume=True)
    assert not resumed.interrupted
    assert_same(resumed.checkpoint, run_training(tmp_path / "straight", settings()).checkpoint)


def test_a_second_interrupt_aborts_at_once(tmp_path):
    def twice(_):
        handler = signal.getsignal(signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        while signal.getsignal(signal.SIGINT) is handler:  # two that wait together are one
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts behind it ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            run_training(tmp_path, settings(), AtUpdate(2, twice))
    finally:
        signal.signal(signal.SIGINT, before)
    assert (tmp_path / "checkpoints" / "latest").readlink().name == "step-00000000"


def test_a_finished_run_says_so(tmp_path):
    first = run_training(tmp_path, settings())
    written = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    again = run_training(tmp_path, settings(), resume=True)
    assert again.finished_before and again.checkpoint == first.checkpoint and again.step == 6
    assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == written


def test_a_run_is_not_overwritten(tmp_path):
    run_training(tmp_path, settings(steps=1))
    with pytest.raises(InputError, match="holds a run already"):
        run_training(tmp_path, settings(steps=1))
    with pytest.raises(InputError, match="no checkpoint to resume from"):
        run_training(tmp_path / "nowhere", settings(), resume=True)


@pytest.mark.parametrize("file", ["model.safetensors", "training.safetensors", "training.json"])
def test_a_damaged_checkpoint_is_named_with_the_one_to_use(tmp_path, file):
    run_training(tmp_path, settings(steps=6, keep=3))
    damaged = tmp_path / "checkpoints" / "step-00000006" / file
    damaged.write_bytes(damaged.read_bytes()[:-10])
    with pytest.raises(InputError, match=rf"step-00000006/{file} is .*remove .*step-00000006 to .*step-00000003"):
        run_training(tmp_path, settings(steps=8), resume=True)


def test_another_model_cannot_resume(tmp_path):
    run_training(tmp_path, settings(steps=2))
    wide = BranchConfig(1, 32, 2)
    model = DualBranch(dataclasses.replace(MODEL, causal=wide))
    with pytest.raises(InputError, match="does not fit the model"):
        run_training(tmp_path, settings(steps=4), model=model, resume=True)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_and_saves_nothing(tmp_path, bad):
    spoil = AtUpdate(5, lambda loss: Loss(loss.total * bad, loss.parts))
    with pytest.raises(TrainingError, match=r"at step 5 the loss is .*step-00000003 is intact.*train\.learning_rate"):
        run_training(tmp_path / "run", settings(), spoil)
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step-00000000", "step-00000003"]
    resumed = run_training(tmp_path / "run", settings(), resume=True)
    assert_same(resumed.checkpoint, run_training(tmp_path / "straight", settings()).checkpoint)


def test_a_gradient_that_is_not_finite_stops(tmp_path):
    def spoil(loss):
        total = loss.total + (loss.total - loss.total.detach()).abs().sqrt()  # value 0, gradient infinite times zero
        return Loss(total, loss.parts)

    with pytest.raises(TrainingError, match="gradient's norm nan"):
        run_training(tmp_path, settings(), AtUpdate(1, spoil))


def test_the_last_and_the_best_checkpoints_are_kept(tmp_path):
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("{}")
    scores = iter([5.0, 3.0, 4.0, math.nan, 4.5, 4.6])
    config = settings(steps=6, checkpoint_every=2, evaluate_every=1, keep=1)
    result = run_training(tmp_path / "run", config, validate=lambda _: next(scores), tokenizer_file=tokenizer)
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in folder.glob("step-*")) == ["step-00000002", "step-00000006"]
    assert (folder / "best").readlink().name == "step-00000002" and result.best_step == 2 and result.best_nll == 3
    assert (folder / "latest").resolve() == result.checkpoint
    assert (folder / "best" / "tokenizer.json").read_text() == "{}"


def test_links_that_a_killed_process_left_behind_are_set_again(tmp_path):
    scores = iter([5.0, 3.0, 4.0])
    config = settings(steps=3, checkpoint_every=1, evaluate_every=1, keep=3)
    run_training(tmp_path, config, validate=lambda _: next(scores))
    latest, best = (tmp_path / "checkpoints" / name for name in ("latest", "best"))
    for link in (latest, best):
        link.unlink()
        link.symlink_to("step-00000001")
    assert run_training(tmp_path, config, resume=True).finished_before
    assert latest.readlink().name == "step-00000003" and best.readlink().name == "step-00000002"


def test_a_checkpoint_is_a_model_folder_with_the_average(tmp_path):
    model, seen = new_model(), {}

    def validate(smooth):
        seen["average"] = {name: p.detach().clone() for name, p in smooth.named_parameters()}
        seen["training"] = smooth.training
        return 1.0

    def sample(smooth):
        return str(torch.equal(smooth.causal.embedding.weight, seen["average"]["causal.embedding.weight"]))

    config = settings(evaluate_every=2, sample_every=2)
    result = run_training(tmp_path, config, model=model, validate=validate, sample=sample)
    config = load_model_config(result.checkpoint)
    loaded = DualBranch(ModelConfig.from_dict(config["model"]))
    load_state(loaded, result.checkpoint)
    raw = load_tensors(result.checkpoint / "training.safetensors")
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, seen["average"][name])
        assert torch.equal(model.get_parameter(name), raw[f"parameters.{name}"])
    assert not torch.equal(loaded.causal.embedding.weight, model.causal.embedding.weight)
    assert not seen["training"] and model.training
    assert [row for row in rows(tmp_path) if "sample" in row] == [{"step": s, "sample": "True"} for s in (2, 4, 6)]


def test_metrics_and_plain_lines(tmp_path):
    with (tmp_path / "log").open("w") as file:
        config = settings(log_every=4, tensorboard=True)
        run_training(tmp_path / "run", config, validate=smooth_loss, console=Console(file=file))
    training = [row for row in rows(tmp_path / "run") if "loss" in row]
    assert [row["step"] for row in training] == [4, 6]
    keys = "step loss parts learning_rate grad_norm tokens tokens_per_second elapsed"
    assert list(training[0]) == keys.split()
    assert training[1]["tokens"] == 6 * 4 * MODEL.context
    assert training[1]["learning_rate"] == pytest.approx(1e-3)
    assert [row["step"] for row in rows(tmp_path / "run") if "validation" in row] == [3, 6]
    assert "step 4/6  loss " in (tmp_path / "log").read_text()
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))


def test_a_full_disk_stops_with_the_checkpoints_whole(tmp_path, monkeypatch):
    import caddf.training.state as state

    save, count = state.save_tensors, iter(range(9))

    def full(path, tensors, metadata=None):
        save(path, tensors, metadata)
        if next(count) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(state, "save_tensors", full)
    with pytest.raises(InputError, match=r"no space left while saving .*step-00000006; free some and resume"):
        run_training(tmp_path, settings())
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["latest", "step-00000000", "step-00000003"]
    assert run_training(tmp_path, settings(), resume=True).step == 6


def test_accumulation_is_one_larger_batch(tmp_path):
    """With a loss that is a mean over rows and draws nothing, two passes of two rows are one of four (float64)."""

    class Halves(Rows):
        def take(self, position, rank=0, world=1):
            whole, _ = Rows(4).take(Position(0, position.offset // (4 // self.rows)))
            first = (position.offset * self.rows) % 4
            return whole[first : first + self.rows], Position(0, position.offset + 1)

    models = []
    for accumulation in (1, 2):
        model, config = new_model(), settings(precision="fp64", accumulation=accumulation)
        run, batches = tmp_path / str(accumulation), Halves(config.rows_per_pass)
        train(run, model, AutoregressiveLoss(), batches, config, describe={"model": {}}, console=Console(quiet=True))
        models.append(model)
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)
    assert [row["loss"] for row in rows(tmp_path / "1")] == pytest.approx([row["loss"] for row in rows(tmp_path / "2")])


def test_learning_rate():
    rates = [learning_rate_at(step, 2.0, 100, 10, 0.1) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([0.2 * step for step in range(1, 11)])
    assert rates[54] == pytest.approx(2 * (0.1 + 0.9 / 2)) and rates[-1] == pytest.approx(0.2)
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[9:]))
    assert learning_rate_at(1, 2.0, 100, 0, 0.1) < 2.0
    assert learning_rate_at(5, 2.0, 5, 5, 0.1) == 2.0


def test_matrices_alone_decay():
    model = new_model()
    optimizer = build_optimizer(model, 1.0, 0.5)
    decayed = {
        name for group in optimizer.param_groups for name in group["param_names"] if group["weight_decay"] == 0.5
    }
    expected = {name for name, p in model.named_parameters() if p.ndim >= 2 and "embedding" not in name}
    assert decayed == expected and optimizer.param_groups[0]["betas"] == (0.9, 0.999)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    with torch.no_grad():
        before = {name: p.clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name] * (0.5 if name in expected else 1.0))


def test_parts_of_a_model_may_have_learning_rates_of_their_own():
    model = new_model()
    model.rate_scales = {"causal": 5.0}
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, 1e-3, 0.0)
    for group in optimizer.param_groups:
        group["lr"] *= group["scale"]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():  # Adam's first step is the rate itself
        moved = 5e-3 if name.startswith("causal.") else 1e-3
        assert torch.allclose(before[name] - parameter, torch.tensor(moved, dtype=parameter.dtype), rtol=1e-3), name


@pytest.mark.parametrize("shape", [(8, 8), (24, 8), (8, 24)])
def test_steps_of_muon_are_orthogonal_and_as_long_as_adams(shape):
    torch.manual_seed(0)
    layer = nn.Linear(shape[1], shape[0], dtype=torch.float64)
    start = layer.weight.detach().clone()
    layer.weight.grad, layer.bias.grad = torch.randn_like(layer.weight), torch.ones_like(layer.bias)
    bias = layer.bias.detach().clone()
    build_optimizer(layer, 1e-3, 0.5, name="muon").step()
    moved = (start * (1 - 1e-3 * 0.5) - layer.weight.detach()) / (0.2 * max(shape) ** 0.5 * 1e-3)
    # Five iterations are exact for no singular value: Jordan et al. give 0.7 to 1.2, the smallest ones less.
    values = torch.linalg.svdvals(moved)
    assert 0.3 < values.min() and values.max() < 1.3
    root_mean_square = (moved * 0.2 * max(shape) ** 0.5).square().mean().sqrt()
    assert 0.1 < root_mean_square < 0.3
    assert torch.allclose(bias - layer.bias, torch.tensor(1e-3, dtype=torch.float64), rtol=1e-3)  # Adam's, not decayed


def test_muon_descends():
    torch.manual_seed(0)
    layer, target = nn.Linear(6, 6, bias=False), torch.randn(6, 6)
    optimizer = build_optimizer(layer, 0.1, 0.0, name="muon")
    losses = []
    for _ in range(200):
        loss = (layer.weight - target).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]


def test_the_average():
    model = nn.Linear(1, 1, bias=False)
    average = ema.start(model)
    value = model.weight.item()
    for step, decay in ((1, 2 / 11), (2, 3 / 12), (3, 0.3)):
        with torch.no_grad():
            model.weight.fill_(step)
        before, average = average, ema.updated(average, model, step, 0.3)
        assert before is not average
        value = decay * value + (1 - decay) * step
        assert average["weight"].item() == pytest.approx(value)
    raw = model.weight.data_ptr()
    with pytest.raises(RuntimeError), ema.averaged(model, average) as smooth:
        assert torch.equal(smooth.weight, average["weight"]) and not smooth.training
        raise RuntimeError
    assert model.weight.data_ptr() == raw and model.weight.item() == 3 and model.training
    assert torch.equal(ema.updated(average, model, 9, 0.0)["weight"], model.weight)
    assert ema.start(nn.Linear(1, 1).bfloat16())["weight"].dtype == torch.float32


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, r"train\.steps is 0; it must be 1 or more"),
        ({"learning_rate": math.nan}, r"train\.learning_rate is nan; it must be above 0"),
        ({"learning_rate": -1.0}, r"train\.learning_rate"),
        ({"ema": 1.0}, r"train\.ema is 1\.0; it must be in \[0, 1\)"),
        ({"warmup": 9, "steps": 5}, r"train\.warmup is 9; it must be at most train\.steps, 5"),
        ({"batch_size": 5, "accumulation": 2}, r"train\.batch_size is 5; it must be a multiple"),
        ({"precision": "fp16"}, r"train\.precision is fp16; it must be one of auto, bf16, fp32, fp64"),
        ({"clip": math.inf}, r"train\.clip"),
        ({"keep": 0}, r"train\.keep"),
    ],
)
def test_bad_settings_are_named(values, message):
    with pytest.raises(InputError, match=message):
        TrainConfig(**values)


def test_resolving_fills_in_what_is_not_set():
    large = Preset(BRANCH, BRANCH, 8, 128, 250_000, 10_000, 1e-4, "gpt2")
    config = TrainConfig().resolved(large)
    assert (config.steps, config.batch_size, config.learning_rate, config.warmup) == (250_000, 128, 1e-4, 10_000)
    assert config.checkpoint_every == config.evaluate_every == config.sample_every == 1000
    short = TrainConfig(steps=400, learning_rate=1.0, sample_every=0).resolved(large)
    assert (short.warmup, short.checkpoint_every, short.evaluate_every, short.sample_every) == (40, 50, 50, 0)
    assert short.resolved(PRESET) == short
    assert TrainConfig(**dataclasses.asdict(short)).resolved(PRESET) == short
    with pytest.raises(InputError, match=r"multiple of train\.accumulation, 3"):
        TrainConfig(accumulation=3).resolved(large)


def test_a_missing_device_is_said(tmp_path):
    missing = "mps" if not torch.mps.is_available() else "cuda"
    with pytest.raises(InputError, match=rf"train\.device is {missing}, which this machine does not have"):
        run_training(tmp_path, settings(device=missing))
    assert not list(Path(tmp_path).iterdir())
