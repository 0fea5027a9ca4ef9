"""`caddf export`: a run as a model folder to be shipped, its weights rounded, with a card that says what it is."""

from __future__ import annotations

import dataclasses
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from caddf.checkpoint import Weights, atomic_folder, read_json, rounded, save_model, write_text_atomic
from caddf.command_line import changed
from caddf.data import TokenSet
from caddf.errors import Checked, InputError, at_least
from caddf.evaluation import EvaluationConfig
from caddf.evaluation.pairing import EXACT, named
from caddf.experiment import METHODS
from caddf.model_settings import ModelSettings
from caddf.models.accounts import accounts
from caddf.running import OWN, SETTINGS, RunSettings, ValidationSettings
from caddf.scoring import evaluate, of_model
from caddf.text_model import TextModel, load, model_folder
from caddf.training import TrainConfig

Values = dict[str, Any]
FILES = frozenset({"README.md", "config.json", "model.safetensors", "tokenizer.json"})
"""Of a model folder."""


@dataclass(frozen=True)
class ExportSettings(Checked):
    """What is written, and what its card says that no file knows.

    out: the new model folder.
    dtype: of the weights on disk. bfloat16 and int8 (a scale for each output) round them; all are read as float32.
    evaluations: results of caddf evaluate --json whose perplexities the card shows.
    data: a token set, on which the card says what rounding changes.
    windows: of that token set.
    data_licence: of the training data, as in "public domain (US)".
    licence: of the weights.
    note: a sentence about the model, for the card's first lines.
    overwrite: replace the folder, if it is there.
    """

    out: str
    dtype: Weights = "bfloat16"
    evaluations: tuple[str, ...] = ()
    data: str | None = None
    windows: int = 32
    data_licence: str = "not stated"
    licence: str = "not stated"
    note: str = ""
    overwrite: bool = False


def export(source: str, settings: ExportSettings) -> Path:
    """Writes the model folder, whole or not at all, and returns it.

    `source` is a run (its latest checkpoint), one of its checkpoints, or a model folder. Raises `InputError` where it
    is none, an evaluation is none, or the folder is there. `overwrite` replaces a model folder, never another.
    """
    out, folder = Path(settings.out).absolute(), model_folder(source)
    if out.exists() and not (out.is_dir() and FILES >= {each.name for each in out.iterdir()}):
        raise InputError(f"out is {settings.out}, which exists and holds other things than a model; give a new folder")
    if out.exists() and not settings.overwrite:
        raise InputError(f"out is {settings.out}, which exists; give a new folder, or --overwrite to replace it")
    at_least(1, settings, "windows")
    data = None if settings.data is None else TokenSet.open(settings.data)
    model = load(folder)
    own = of_model(model) if settings.evaluations else {}
    tables = [_evaluation(Path(file), own) for file in settings.evaluations]
    before = None if data is None else _measured(model, data, settings.windows)
    with atomic_folder(out, replace=settings.overwrite) as partial:
        about = {**model.about, "model": model.model.config.to_dict(), "stages": _stages(folder)}
        save_model(partial, rounded(model.model.state_dict(), settings.dtype), about)
        model.tokenizer.save(partial)
        changes = []
        if data is not None and before is not None:
            after = _measured(load(partial), data, settings.windows)
            changes = [{"name": name, "before": was, "after": after[name]} for name, was in before.items()]
        facts = _facts(model, folder) | {"size": (partial / "model.safetensors").stat().st_size}
        facts |= {"name": out.name, "settings": settings, "evaluations": tables, "changes": changes}
        templates = Environment(loader=PackageLoader("caddf"), trim_blocks=True, keep_trailing_newline=True)
        templates.filters["duration"] = _duration
        write_text_atomic(partial / "README.md", templates.get_template("model_card.md").render(facts))
    return out


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.0f} min"


def _measured(model: TextModel, data: TokenSet, windows: int) -> dict[str, float]:
    """Perplexities on some windows: of the same text, with the same noise, each time."""
    split = "test" if "test" in data.manifest["splits"] else "validation"
    settings = EvaluationConfig(samples=2, max_windows=windows, anchors=(), nfe=(), paths=0)
    likelihoods = evaluate(model, data, split=split, settings=settings)["likelihoods"]
    return {name: cell["ppl"] for name, cell in named(likelihoods)}


def _evaluation(file: Path, model: Values) -> Values:
    """A file of `caddf evaluate --json`, and what it is called; raises `InputError` where it is of another model."""
    values = read_json(file)
    for name, own in model.items():  # files of earlier versions do not say
        if values.get(name, own) != own:
            raise InputError(
                f"evaluations holds {file}, which is of another model: its {name} is {values[name]}, this one's {own}"
            )
    if not isinstance(values.get("likelihoods"), dict):
        raise InputError(
            f"evaluations holds {file}, without likelihoods; caddf evaluate RUN --data SET --json makes one"
        )
    rows = [{"name": name, "exact": name in EXACT, **cell} for name, cell in named(values["likelihoods"])]
    return {
        "title": Path(values["data"]).name if "data" in values else file.stem,
        "model": Path(values["model"]).name if "model" in values else "",
        "split": values.get("split", "test"),
        "windows": values["windows"],
        "rows": rows,
    }


def _facts(model: TextModel, folder: Path) -> Values:
    """What the files in and about `folder` say of the model: its sizes, and, of a run, how it was trained."""
    stages = _stages(folder)
    last = stages[-1] if stages else {}
    return {
        "model": model,
        "method": model.method,
        "accounts": accounts(model.model),
        "progress": _progress_of(folder) or last.get("progress"),
        "trained_on": last.get("trained_on"),
        "stages": stages,
        "read": sum(stage["progress"]["tokens"] for stage in stages if stage["progress"]),
    }


def _settings_of(folder: Path) -> RunSettings | None:
    """Of the run that a checkpoint is of, where it is of one."""
    run = folder.parent.parent
    return RunSettings.load(run) if (run / SETTINGS).is_file() else None


def _progress_of(folder: Path) -> Values | None:
    file = folder / "training.json"
    return read_json(file) if file.is_file() else None


def _stages(folder: Path) -> list[Values]:
    """How a checkpoint was trained: the run that it is of, after the runs that this one took its weights from.

    An exported model says it itself.
    """
    trained, file = _settings_of(folder), folder / "config.json"
    if trained is None:
        stages: list[Values] = read_json(file).get("stages", []) if file.is_file() else []
        return stages
    before = [] if trained.init_from is None or not Path(trained.init_from).exists() else (
        _stages(model_folder(trained.init_from))
    )  # fmt: skip
    # Paths say where a run was, not what it is: each is called by its place.
    number, source = len(before) + 1, None if trained.init_from is None else f"RUN{len(before)}"
    named_so = dataclasses.replace(trained, init_from=source if before else trained.init_from)
    whole, names = _progress_of(folder), ("step", "tokens", "elapsed", "best_step", "best_nll")
    progress = None if whole is None else {name: whole[name] for name in names}
    about = {"progress": progress, "trained_on": _training_data(Path(trained.data))}
    return [*before, {"command": training_command(named_so, f"RUN{number}"), **about}]


def _training_data(folder: Path) -> Values | None:
    """The training split of a token set, where that is still there."""
    if not (folder / "manifest.json").is_file():
        return None
    split: Values = TokenSet.open(folder).manifest["splits"]["train"]
    source = split["source"]
    return {**split, "source": source if ":" in source else Path(source).name}  # a path says where, not what


def training_command(settings: RunSettings, run: str = "RUN") -> str:
    """The `caddf train` that starts such a run: every setting that is not the default."""
    method = METHODS[settings.method]
    objective = {**{each.name: each.default for each in dataclasses.fields(method.settings)}, **method.defaults}
    sections = {
        "model": (settings.model, dataclasses.asdict(ModelSettings())),
        "objective": (settings.objective, objective),
        "train": (settings.train, dataclasses.asdict(TrainConfig())),
        "validation": (settings.validation, dataclasses.asdict(ValidationSettings())),
    }
    words = ["caddf", "train", "--config", settings.method, "--data", Path(settings.data).name, "--out", run]
    plain = dataclasses.asdict(RunSettings(settings.data))
    words += changed({name: getattr(settings, name) for name in ("init_from", "dtype", "seed")}, plain, "--{}".format)
    for name, (given, defaults) in sections.items():
        values = {key: value for key, value in dataclasses.asdict(given).items() if key not in OWN}
        words += changed(values, defaults, f"--{name}.{{}}".format)
    return shlex.join(words)
