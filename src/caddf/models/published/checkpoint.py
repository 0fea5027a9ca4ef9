"""A published checkpoint, and the files that hold one."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from caddf.checkpoint import check_tensors, load_tensors, read_json
from caddf.errors import InputError
from caddf.models.causal_model import CausalConfig
from caddf.models.single import SingleConfig

RUN_CONFIG, RUN_WEIGHTS = Path(".hydra/config.yaml"), Path("checkpoints-meta/checkpoint.pth")
"""Where SEDD's and RADD's training code keeps a run's settings and state."""
ROTARY = "rotary_emb.inv_freq"
"""What is in a state beside parameters."""
State = dict[str, Tensor]


@dataclass(frozen=True)
class Published:
    """What a checkpoint is in this project's terms.

    method, architecture: names of `caddf.experiment`'s tables. objective: what it says of its objective's settings.
    plain: its tensors' names as they are without a prefix; shapes: those names and shapes, the buffers aside;
    convert: those tensors to the network's.
    """

    method: str
    architecture: str
    config: CausalConfig | SingleConfig
    plain: Callable[[State], State]
    shapes: Mapping[str, tuple[int, ...]]
    convert: Callable[[State], State]
    objective: dict[str, Any] = field(default_factory=dict)

    def state(self, folder: Path) -> State:
        """The network's state; raises `InputError` where the weights in `folder` are missing, damaged or of others."""
        path, given = read_weights(folder)
        given = self.plain(given)
        check_tensors(path, given, self.shapes)
        return {name: tensor.contiguous() for name, tensor in self.convert(given).items()}


class Settings:
    """A published configuration, read with errors that name the file's setting."""

    def __init__(self, values: dict[str, Any], name: str = "") -> None:
        self.values, self.name = values, name

    def part(self, name: str) -> Settings:
        """The settings under `name`, none where there are none."""
        values = self.values.get(name)
        return Settings(values if isinstance(values, dict) else {}, f"{self.name}{name}.")

    def whole(self, name: str) -> int:
        """A whole number of 1 or more, as every size is."""
        value = self.values.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f"the checkpoint's {self.name}{name} is {value!r}; it must be a whole number of 1 or more")
        return value

    def only(self, **supported: tuple[Any, ...]) -> None:
        """Raises `InputError` where a setting has another value than those, of which the first is its default."""
        for name, values in supported.items():
            if (value := self.values.get(name, values[0])) not in values:
                wanted = " or ".join(map(repr, values))
                raise InputError(
                    f"the checkpoint's {self.name}{name} is {value!r}; this project's networks have {wanted}"
                )


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration in `folder`: of a hub repository or of a training run; empty where there is neither."""
    if (folder / "config.json").is_file():
        return read_json(folder / "config.json")
    path = folder / RUN_CONFIG
    if not path.is_file():
        return {}
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not YAML ({error})") from None
    return values if isinstance(values, dict) else {}


def read_weights(folder: Path) -> tuple[Path, State]:
    """The file of the weights in `folder`, or of the index of their shards, and the tensors, on the CPU.

    Raises `InputError` where there is none, or it is damaged or could run code.
    """
    for name, read in {"model.safetensors": load_tensors, "pytorch_model.bin": _unpickled_tensors}.items():
        if (path := folder / name).is_file():
            return path, read(path)
        if (index := folder / f"{name}.index.json").is_file():
            return index, {k: v for shard in _shards(index) for k, v in read(folder / shard).items()}
    if (path := folder / RUN_WEIGHTS).is_file():
        return path, _averaged(path)
    raise InputError(f"{folder} holds no weights; model.safetensors or pytorch_model.bin (or shards of it) is needed")


def _shards(index: Path) -> list[str]:
    shards = read_json(index).get("weight_map")
    names = sorted(set(map(str, shards.values()))) if isinstance(shards, dict) else []
    if not names or any(Path(name).name != name for name in names):
        raise InputError(f"{index} does not say which files beside it hold the weights; it needs a weight_map")
    return names


def _unpickled(path: Path) -> dict[str, Any]:
    """A file of `torch.save`, of which only tensors and plain values are made."""
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise InputError(
            f"{path} is truncated or no file of weights, or holds more than tensors, which could run code and is not "
            "loaded; convert it to safetensors"
        ) from None
    except (OSError, RuntimeError, EOFError):
        raise InputError(f"{path} is truncated or no file of weights") from None
    return values if isinstance(values, dict) else {}


def _unpickled_tensors(path: Path) -> State:
    return _tensors(path, _unpickled(path))


def _tensors(path: Path, values: Any) -> State:
    if not isinstance(values, dict) or not values or not all(isinstance(value, Tensor) for value in values.values()):
        raise InputError(f"{path} is no file of weights; names with tensors are needed")
    return values


def _averaged(path: Path) -> State:
    """The averaged weights of a training run's state: a list in the order of the model's parameters."""
    values = _unpickled(path)
    model, average = _tensors(path, values.get("model")), values.get("ema")
    shadow = average.get("shadow_params") if isinstance(average, dict) else None
    names = [name for name in model if name != ROTARY]
    if not isinstance(shadow, list) or [tuple(t.shape) for t in shadow] != [tuple(model[n].shape) for n in names]:
        raise InputError(f"{path} holds no average of the weights that fits them; ema.shadow_params is needed")
    return {**model, **dict(zip(names, shadow, strict=True))}
