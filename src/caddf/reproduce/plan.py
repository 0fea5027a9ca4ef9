"""The pieces that tables are made of: token sets, runs, evaluations and decodings; each has its place and its maker."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from caddf.benchmarks import DecodeSettings, decode
from caddf.checkpoint import read_json, write_json_atomic
from caddf.data import TokenSet, prepare
from caddf.errors import Checked, InputError, at_least, check_seed
from caddf.evaluation import EvaluationConfig
from caddf.experiment import METHODS
from caddf.machine import machine
from caddf.model_settings import ModelSettings, Size
from caddf.models.accounts import accounts
from caddf.running import OWN, RunSettings, ValidationSettings, resume, start
from caddf.scoring import evaluate
from caddf.text_model import fingerprint, load
from caddf.training import TrainConfig

SETS = {
    "prolong": "ProLong",
    "wikitext2": "WikiText2",
    "json-mode-eval": "CFG",
    "wikitext103": "WikiText103",
    "c4": "C4",
    "fineweb": "FineWeb",
}
CONTEXT = 1024
"""Longest rows that are decoded (Table 3: 1024, of which half are new); of a shorter context all of it."""


DEMO = {"steps": 600, "batch_size": 4}
"""Training at scale `demo`, where it is not set: a quarter of an hour of a core for the slowest of the networks."""


@dataclass(frozen=True)
class ReproduceSettings(Checked):
    """A table, and what it costs.

    scale: the size of the models.
    data_root: folder of local copies of the data sets; not set, they come from the hub, but for books, which are not
        there: their files are train*.jsonl, valid*.jsonl and test*.jsonl, a book in each row.
    work: folder of token sets, runs, evaluations and decodings, which later calls go on from.
    out: folder of the table; not set, results/TABLE-SCALE, or results/TABLE-SCALE-CONTEXT.
    training_set: what the methods are trained on.
    methods: a comma-separated choice of the table's methods; not set, all of them (of table3, six).
    steps: updates of each method; not set, the preset's, and 600 at scale demo.
    batch_size: rows of an update; not set, the preset's, and 4 at scale demo.
    context: tokens of a row of an update, and the most of one that is scored or decoded; not set, the preset's. Runs of
        different contexts have different places, and the token sets in common.
    windows: scored per data set, the same for every method.
    samples: Monte-Carlo samples per window and bound.
    prompts: the data set whose text is continued (table3, table4).
    judge: a run or model folder that reads left to right, by which generated text is scored (table3); not set, the
        table's own GPT-2, which flatters its own text.
    batch: rows decoded together, as in 1,8; each size is measured (table3, table4).
    repeats: rounds in which every decoder runs once (table3, table4); those beyond what is measured are added.
    only: do the data, training, evaluation or decoding part alone; the table is written from what is there.
    workers: trainings and evaluations side by side, each of one thread on a CPU, so that no figure depends on how many
        there are; not set, as many as PyTorch has threads, and one on a GPU.
    device: auto (a GPU where there is one), cpu, cuda or mps.
    seed: of the weights, the order of the data, and all draws.
    """

    scale: Size = "demo"
    data_root: str | None = None
    work: str = "runs/reproduce"
    out: str | None = None
    training_set: str = "books"
    methods: str | None = None
    steps: int | None = None
    batch_size: int | None = None
    context: int | None = None
    windows: int = 64
    samples: int = 4
    prompts: str = "prolong"
    judge: str | None = None
    batch: str = "1"
    repeats: int = 5
    only: Literal["all", "data", "train", "evaluate", "decode", "table"] = "all"
    workers: int | None = None
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in DEMO.items() if self.scale == "demo" else ():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        at_least(1, self, "windows", "samples", "repeats", "workers")
        ModelSettings(self.scale, context=self.context).dual(256, 0)  # raises for a context that is too short
        TrainConfig(steps=self.steps, batch_size=self.batch_size)  # raises
        check_seed(self.seed)

    @property
    def place(self) -> str:
        """The name of the scale, and the context where one is given."""
        return self.scale if self.context is None else f"{self.scale}-{self.context}"


@dataclass(frozen=True)
class Variant:
    """What is trained: a method, with changes to its model (`ModelSettings`) that keep its number of parameters.

    name: of its run and its evaluations.
    """

    name: str
    method: str
    model: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """One piece of work: done if `product` exists, and is `whole`. `do` is False if it was interrupted."""

    about: str
    product: Path
    kind: str
    do: Callable[[Console], bool]
    whole: bool = True

    @property
    def left(self) -> bool:
        """Whether it is still to be done."""
        return not (self.whole and self.product.exists())


@dataclass(frozen=True)
class Workshop:
    """Where the pieces lie, and how each is made; those of one scale and seed are shared by all tables."""

    settings: ReproduceSettings

    @property
    def data(self) -> Path:
        """Of the token sets of this scale."""
        return Path(self.settings.work) / self.settings.scale / "data"

    @property
    def folder(self) -> Path:
        """Of all other pieces of this scale and context."""
        return Path(self.settings.work) / self.settings.place

    def run(self, variant: Variant) -> Path:
        """The folder of a run."""
        return self.folder / "runs" / f"{variant.name}-{self.settings.seed}"

    def evaluation(self, variant: Variant, name: str) -> Path:
        """The file of an evaluation on one data set."""
        return self.folder / "evaluations" / f"{variant.name}-{self.settings.seed}" / f"{name}.json"

    def decoding(self, contest: str) -> Path:
        """The folder of what `benchmark decode` leaves."""
        return self.folder / "decode" / f"{contest}-{self.settings.seed}"

    def decoded(self, contest: str) -> bool:
        """Whether all rounds of a contest are measured, and as many as are wanted."""
        folder = self.decoding(contest)
        if not (folder / "decode.md").exists():
            return False
        measured = read_json(folder / "decode.json")
        return "shown" in measured and measured["settings"]["repeats"] >= self.settings.repeats

    def sources(self) -> dict[str, dict[str, Any]]:
        """What was read of each data set that is prepared: its name or files (`source`), and how many documents."""
        sets = {name: self.data / name for name in SETS}
        read = {name: TokenSet.open(place).manifest["splits"]["test"] for name, place in sets.items() if place.exists()}
        return {name: {key: split[key] for key in ("source", "documents")} for name, split in read.items()}

    def trained(self, variant: Variant) -> dict[str, Any]:
        """Steps, tokens, batch, learning rate and seconds of a run that is done."""
        return read_json(self.run(variant) / "done.json")

    def commits(self, variants: Iterable[Variant], contest: str) -> dict[str, list[str]]:
        """By which commits runs were ended, evaluated and decoded; those whose pieces do not say are left out."""
        runs, found = list(variants), {}
        for kind, files in {
            "trained": [self.run(each) / "done.json" for each in runs],
            "evaluated": [self.evaluation(each, name) for each in runs for name in SETS],
            "decoded": [self.decoding(contest) / "decode.json"],
        }.items():
            made = [read_json(file) for file in files if file.exists()]
            calls = [call for each in made for call in (each.get("machine", {}), *each.get("continued", []))]
            found[kind] = sorted({call["commit"] for call in calls if call.get("commit")})
        return {kind: commits for kind, commits in found.items() if commits}

    def check(self, variants: Iterable[Variant]) -> None:
        """Raises `InputError` where pieces of `variants` that are there were made with other settings."""
        given, train = self.settings, self.data / "train"
        if train.exists():
            source = TokenSet.open(train).manifest["splits"]["train"]["source"]
            made_of = source.partition(": ")[0]  # a data set by name, before its files; else the text as it was given
            same(train, {"training_set": given.training_set}, {"training_set": made_of})
        weights = {variant.name: self.weights(variant) for variant in variants}
        for variant in variants:
            if (run := self.run(variant)).exists():
                same(run, self._decides(self._run_settings(variant)), self._decides(RunSettings.load(run)))
            for name in SETS:
                if (file := self.evaluation(variant, name)).exists():
                    measured = read_json(file)
                    self._check_source(file.parent, variant, measured.get("weights"), weights[variant.name])
                    protocol = measured.get("protocol", {})
                    made = {"windows": protocol.get("max_windows"), "samples": measured.get("samples")}
                    same(file, {"windows": given.windows, "samples": given.samples}, made)

        if None not in weights.values():
            there = {read_json(done).get("weights") for done in (self.folder / "runs").glob("*/done.json")}
            for file in (self.folder / "decode").glob(f"*-{given.seed}/decode.json"):
                for row in read_json(file)["rows"]:
                    if row.get("weights") not in there:
                        raise InputError(
                            f"{file.parent} was made of another {row['model']} than any run is now; remove it, "
                            "or give another --work"
                        )

    def weights(self, variant: Variant) -> str | None:
        """The fingerprint of the weights of a run that is done."""
        done = self.run(variant) / "done.json"
        return read_json(done).get("weights") if done.exists() else None

    def _check_source(self, place: Path, variant: Variant, made: str | None, weights: str | None) -> None:
        """Raises `InputError` where `place` was made of other weights than those of the run that is there."""
        if weights is not None and weights != made:
            run = self.run(variant)
            raise InputError(f"{place} was made of another run than {run} is now; remove it, or give another --work")

    def _decides(self, run: RunSettings) -> dict[str, Any]:
        """What of a run's settings decides its weights, but for the data and the machine."""
        train = run.train.resolved(ModelSettings(self.settings.scale).preset)
        parts = {"model": asdict(run.model), "objective": asdict(run.objective), "train": asdict(train)}
        return {
            key if part == "train" else f"{part}.{key}": value
            for part, values in parts.items()
            for key, value in values.items()
            if key not in OWN
        }

    # Jobs.

    def prepare(self, *names: str) -> Iterator[Job]:
        """The training set, whose tokenizer all have, and then the data sets `names`."""
        train = self.settings.training_set
        product = self.data / "train"
        yield Job(f"prepare {train}", product, "data", partial(self._prepare_training_set, product))
        for name in names:
            product = self.data / name
            yield Job(f"prepare {name}", product, "data", partial(self._prepare, name, product))

    def train(self, variant: Variant) -> Job:
        """A run, on the same tokens in the same order for every variant."""
        product = self.run(variant) / "done.json"
        return Job(f"train {variant.name}", product, "train", partial(self._train, variant, product))

    def evaluate(self, variant: Variant, name: str) -> Job:
        """Every likelihood, bound and accuracy on one data set."""
        product = self.evaluation(variant, name)
        about = f"evaluate {variant.name} on {name}"
        return Job(about, product, "evaluate", partial(self._evaluate, variant, name, product))

    def decode(self, contest: str, variants: dict[str, Variant], **settings: Any) -> Job:
        """All of `variants`, by name, in turns on one machine; it goes on with the rounds that are not measured."""
        product = self.decoding(contest) / "decode.md"  # written once all is measured
        about, do = f"decode with {', '.join(variants)}", partial(self._decode, variants, product.parent, settings)
        return Job(about, product, "decode", do, whole=self.decoded(contest))

    # How they are done.

    def _prepare_training_set(self, product: Path, console: Console) -> bool:
        given = self.settings
        tokenizer = ModelSettings(given.scale).preset.tokenizer
        prepare(product, input=given.training_set, tokenizer=tokenizer, data_root=given.data_root, seed=given.seed)
        return True

    def _prepare(self, name: str, product: Path, console: Console) -> bool:
        tokenizer = str(self.data / "train")
        prepare(product, test=name, tokenizer=tokenizer, data_root=self.settings.data_root)
        return True

    def _train(self, variant: Variant, product: Path, console: Console) -> bool:
        run = self.run(variant)
        result = resume(run, console) if run.exists() else start(self._run_settings(variant), run, console)
        if not result.interrupted:
            resolved = RunSettings.load(run).train.resolved(ModelSettings(self.settings.scale).preset)
            about = {
                "steps": result.step,
                "tokens": result.tokens,
                "batch_size": resolved.batch_size,
                "learning_rate": resolved.learning_rate,
                "seconds": result.elapsed,
                "weights": fingerprint(load(run).model),
                "machine": machine(),
            }
            write_json_atomic(product, about)
        return not result.interrupted

    def _run_settings(self, variant: Variant) -> RunSettings:
        given, method, data = self.settings, METHODS[variant.method], self.data / "train"
        model = ModelSettings(given.scale, context=given.context)
        if variant.model:
            vocab_size = TokenSet.open(data).tokenizer.vocab_size
            model = replace(model, match=model.parameters(vocab_size), **variant.model)
        return RunSettings(
            data=str(data),
            method=variant.method,
            device=given.device,  # type: ignore[arg-type]
            seed=given.seed,
            model=model,
            objective=method.settings(**method.defaults),
            train=TrainConfig(steps=given.steps, batch_size=given.batch_size, sample_every=0, tensorboard=False),
            validation=ValidationSettings(windows=64),
        )

    def _evaluate(self, variant: Variant, name: str, product: Path, console: Console) -> bool:
        given = self.settings
        model = load(self.run(variant), device=given.device)
        measured = EvaluationConfig(
            samples=given.samples, max_windows=given.windows, nfe=(), paths=0, seed=given.seed
        )  # fmt: skip
        evaluated = evaluate(model, TokenSet.open(self.data / name), split="test", settings=measured)
        product.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomic(product, {**evaluated, "accounts": accounts(model.model), "machine": machine()})
        return True

    def _decode(self, variants: dict[str, Variant], out: Path, settings: dict[str, Any], console: Console) -> bool:
        given = self.settings
        context = min(CONTEXT, given.context or ModelSettings(given.scale).length)
        whole = DecodeSettings(
            models=",".join(f"{name}={self.run(variant)}" for name, variant in variants.items()),
            prompts=str(self.data / given.prompts),
            context=context,
            new_tokens=context // 2,
            batch=given.batch,
            repeats=given.repeats,
            windows=given.windows,
            device=given.device,
            seed=given.seed,
            out=str(out),
            **settings,
        )
        decode(whole, console)
        return True


def same(place: Path, wanted: dict[str, Any], made: dict[str, Any]) -> None:
    """Raises `InputError` at the first setting by which `place` was made otherwise than is wanted."""
    for name, value in wanted.items():
        if made.get(name) != value:
            raise InputError(
                f"{name} is {value}, but {place} was made with {made.get(name)}; give another --work, or remove it"
            )
