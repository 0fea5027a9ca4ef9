"""`caddf benchmark train`: a training step of ours against plain PyTorch with full logits, on the same network."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from rich.console import Console
from torch import Tensor

from caddf.benchmarks.given import whole_numbers, written
from caddf.benchmarks.measure import Spread, allocated, fresh, now, resident
from caddf.benchmarks.results import Benchmark, Drawing, Results, Told, dots, in_rounds, put, put_median, spread
from caddf.benchmarks.roster import needs
from caddf.errors import Checked, InputError, at_least, check_seed, once
from caddf.experiment import ARCHITECTURES, METHODS, Network
from caddf.model_settings import ModelSettings, Size
from caddf.text_model import resolve_device
from caddf.training.optimizer import build_optimizer

Place = tuple[str, int, str]
"""Of a row in the table: method, rows of a step, variant."""
LEARNING_RATE = 1e-5
"""Of the steps that are timed; small, so that many of them leave the network about as it was."""
COLUMNS = {
    "method": "",
    "variant": "ours, or plain PyTorch: all logits [B, L, V] at once, AdamW as it comes",
    "rows x tokens": "of a step: forward, backward, optimizer",
    "tokens/s": "median (quartiles)",
    "memory": "MiB at the peak above weights and optimizer state: gradients, activations, logits",
    "parameters": "in all",
}


@dataclass(frozen=True)
class TrainSettings(Checked):
    """What is trained for a few steps.

    size: of the network.
    methods: a comma-separated choice of methods.
    batch: rows of a step.
    length: tokens of a row.
    steps: timed in each round, after one that is not.
    repeats: rounds in which each variant steps.
    memory: measure peak memory too (on a CPU, each variant steps twice more in a process of its own).
    precision: float32, or bfloat16 (autocast over float32 weights).
    device: auto (a GPU where there is one), cpu, cuda or mps.
    seed: of weights, tokens and noise.
    out: folder of the results; not set, results/train-SIZE.
    """

    size: Size = "demo"
    methods: str = "caddf-lambda-dce,gpt2"
    batch: str = "8"
    length: int = 512
    steps: int = 1
    repeats: int = 5
    memory: bool = True
    precision: Literal["float32", "bfloat16"] = "float32"
    device: str = "auto"
    seed: int = 0
    out: str | None = None


class FullLogits:
    """A model whose losses come from log-probabilities of all positions, [B, L, V] in one piece, by autograd."""

    projection = None

    def __init__(self, model: Any) -> None:
        self.model = model
        self.made: tuple[Any, dict[str | None, Tensor]] = None, {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, *given: Any) -> Any:
        """The model itself."""
        return self.model(*given)

    def nll(
        self, states: Any, where: Bool[Tensor, "B L"], targets: Int[Tensor, "B L"], head: str | None = None
    ) -> Float[Tensor, " N"]:
        """Cross-entropy at every position, and then of those in `where`."""
        return F.nll_loss(self._all(states, where, head), targets.flatten(), reduction="none").view(where.shape)[where]

    def log_probs(self, states: Any, where: Bool[Tensor, "B L"], head: str) -> Float[Tensor, "N V"]:
        """Those of all positions, made once for each head, and then of those in `where`."""
        return self._all(states, where, head)[where.flatten()]

    def _all(self, states: Any, where: Bool[Tensor, "B L"], head: str | None) -> Float[Tensor, "BL V"]:
        if self.made[0] is not states:
            self.made = states, {}
        if head not in self.made[1]:
            with torch.enable_grad():
                heads = () if head is None else (head,)
                self.made[1][head] = self.model.log_probs(states, torch.ones_like(where), *heads)
        return self.made[1][head]

    def forget(self) -> None:
        """What was made of the last states is let go."""
        self.made = None, {}


class Stepper:
    """A network, its objective and its optimizer, of one variant; a call is a step."""

    def __init__(self, settings: TrainSettings, method: str, rows: int, variant: str) -> None:
        device = resolve_device(settings.device)
        self.network, objective = build(settings, method)
        self.network.to(device).train()
        self.objective: Any = objective
        self.model: Any = FullLogits(self.network) if variant == "plain" else self.network
        if variant == "plain":
            self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=LEARNING_RATE)
        else:
            self.optimizer = build_optimizer(self.network, LEARNING_RATE, weight_decay=0.1)
        self.generator = torch.Generator().manual_seed(settings.seed)
        shape = (rows, settings.length)
        self.tokens = torch.randint(self.network.vocab_size, shape, generator=self.generator).to(device)
        bf16 = settings.precision == "bfloat16"
        self.autocast: Callable[[], AbstractContextManager[Any]] = partial(
            torch.autocast, device.type, torch.bfloat16, enabled=bf16
        )

    def __call__(self) -> None:
        """Forward, backward, optimizer."""
        with self.autocast():
            loss = self.objective(self.model, self.tokens, self.generator).total
        loss.backward()
        if isinstance(self.model, FullLogits):
            self.model.forget()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @property
    def kept(self) -> int:
        """Bytes of weights and optimizer state, which stay between steps."""
        state = (value for values in self.optimizer.state.values() for value in values.values())
        tensors = [*self.network.parameters(), *(value for value in state if isinstance(value, Tensor))]
        return sum(tensor.nbytes for tensor in tensors)


def build(settings: TrainSettings, method: str) -> tuple[Network, Any]:
    """The network of a method, at its preset's size, and its objective."""
    about = METHODS[method]
    model = ModelSettings(settings.size)
    if model.preset.context < settings.length:
        model = dataclasses.replace(model, context=settings.length)
    config = about.configure(model, model.preset.vocab_size, 0)
    torch.manual_seed(settings.seed)
    network = ARCHITECTURES[about.architecture].network(config)
    return network, about.build(about.settings(**about.defaults), config)


def train(settings: TrainSettings, console: Console) -> Results:
    """Measures ours and plain steps in turns; writes train.json, .md, .png and .svg.

    Raises `InputError` before anything is measured.
    """
    needs("matplotlib")
    device = resolve_device(settings.device)
    check(settings)
    if settings.memory and device.type == "cpu":
        needs("psutil")
    folder = settings.out or f"results/train-{settings.size}"
    results = Results.open("train", folder, written(settings), free=("repeats", "memory"))
    table = [
        (method, rows, variant)
        for method in settings.methods.split(",")
        for rows in whole_numbers("batch", settings.batch)
        for variant in ("ours", "plain")
    ]
    kept = {(row["method"], row["batch"], row["variant"]): row for row in results.values.get("rows", [])}
    results.values["rows"] = [
        kept.get(place) or dict(zip(("method", "batch", "variant"), place, strict=True), rounds=[], peak_memory=None)
        for place in table
    ]
    steppers: dict[tuple[str, int, str], Stepper] = {}
    rows = list(zip(table, results.values["rows"], strict=True))
    for place, row in rows:  # before this process takes memory of its own
        if settings.memory and row["peak_memory"] is None and device.type == "cpu":
            row["peak_memory"] = fresh(resident_peak, settings, *place)
            results.save()

    def warm_up(place: Place, turn: int) -> None:
        steppers[place] = Stepper(settings, *place)
        steppers[place]()

    def measure(place: Place, turn: int) -> dict[str, Any]:
        step, figures = steppers[place], dict[str, Any]()
        if device.type == "cuda":
            with allocated(device) as peak:
                seconds = timed(step, settings.steps, device)
            figures["peak"] = peak.most - peak.first
        else:
            seconds = timed(step, settings.steps, device)
        parameters = step.network.parameter_counts()["total"]
        speed = place[1] * settings.length / seconds
        return {"seconds": seconds, "tokens_per_second": speed, "parameters": parameters, **figures}

    def say(place: Place, figures: dict[str, Any]) -> str:
        return f"{' '.join(map(str, place))}: {figures['seconds']:.3f} s"

    in_rounds(results, rows, settings.repeats, measure, say, console, warm_up)
    for _, row in rows:
        put_median(row, "tokens_per_second")
        row["parameters"] = row.get("parameters") or row["rounds"][-1]["parameters"]
        peaks = [each["peak"] for each in row["rounds"] if "peak" in each]
        if peaks:
            row["peak_memory"] = max(*peaks, row["peak_memory"] or 0)
    put(results.values, ratios(results.values["rows"]))
    text = f"Steps of {settings.length} tokens a row; random tokens and weights."
    results.write(text, COLUMNS, partial(cells, length=settings.length), partial(draw, rows=results.values["rows"]))
    return results


def check(settings: TrainSettings) -> None:
    """Raises `InputError` for settings that do not fit."""
    check_seed(settings.seed)
    once("methods", settings.methods.split(","))
    for method in settings.methods.split(","):
        if method not in METHODS:
            raise InputError(f"methods holds {method}; it must be of {', '.join(METHODS)}")
    at_least(1, settings, "length", "steps", "repeats")


def timed(step: Callable[[], None], steps: int, device: torch.device) -> float:
    """Seconds of a step, the mean of `steps`."""
    begun = now(device)
    for _ in range(steps):
        step()
    return (now(device) - begun) / steps


def resident_peak(settings: TrainSettings, method: str, rows: int, variant: str) -> int:
    """What two steps add to the resident memory of this process beyond what they leave; run it in a `fresh` one."""
    step = Stepper(settings, method, rows, variant)
    weights = step.kept
    with resident() as peak:
        step()
        step()
    return peak.most - peak.first - (step.kept - weights)


def ratios(rows: Sequence[dict[str, Any]]) -> dict[str, Told]:
    """Ours over plain: speed within each round, and memory; of the first method by the plain keys."""
    told: dict[str, Told] = {}
    for ours, plain in zip(rows[::2], rows[1::2], strict=True):
        of = f"{ours['method']}, {ours['batch']} rows, ours / plain"
        suffix = f" {ours['method']} {ours['batch']}" if told else ""
        speed = Spread.ratio(*([each["tokens_per_second"] for each in row["rounds"]] for row in (ours, plain)))
        told[f"train_speed{suffix}"] = Told(of, speed.median, (speed.low, speed.high))
        if ours["peak_memory"] and plain["peak_memory"]:
            told[f"train_memory{suffix}"] = Told(of, ours["peak_memory"] / plain["peak_memory"])
    return told


def cells(row: dict[str, Any], length: int) -> list[str]:
    """A row of the Markdown table."""
    return [
        row["method"],
        row["variant"],
        f"{row['batch']} x {length}",
        spread(row["tokens_per_second"], row["tokens_per_second_quartiles"]),
        "" if row["peak_memory"] is None else f"{row['peak_memory'] / 2**20:,.0f}",
        f"{row['parameters']:,}",
    ]


def draw(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    """Tokens a second of each variant."""
    names = [f"{row['method']}, {row['batch']} rows, {row['variant']}" for row in rows]
    dots(axes, names, rows, ["C0" if row["variant"] == "ours" else "0.6" for row in rows])
    axes.set(xlabel="tokens per second of a training step (median, quartiles)")


TRAIN = Benchmark(
    "train",
    "A training step",
    TrainSettings,
    train,
    {"train": Drawing("Tokens per second of a training step", draw)},
    "caddf benchmark train",
)
