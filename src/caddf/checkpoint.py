"""Folders and files on disk: written whole or not at all, and checked when they are read.

A *model folder* holds `config.json`, `model.safetensors` and `tokenizer.json`; every checkpoint of a run is one. Its
weights are float32, or were rounded to be shipped (`rounded`): they are read as if they had always been those numbers.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from caddf.errors import InputError
from caddf.quantise import integers
from caddf.version import installed_version

FORMAT = 1
"""Version of the model folder's layout; another one is refused."""
Weights = Literal["float32", "bfloat16", "int8"]
"""What the weights of a model folder are kept as."""
SCALES = "_scales"
"""Ends the name of the scales of an int8 matrix."""
TEMPORARY = ".tmp"
"""Suffix of what is being written; a hidden file or folder with it is a leftover of a killed process."""


class DiskFull(InputError):
    """There is no space, or no quota, for what is being saved."""


@contextmanager
def saving(path: Path) -> Iterator[None]:
    """A full disk while `path`, or something for it, is written becomes an `InputError` that names `path`."""
    try:
        yield
    except (OSError, SafetensorError, DiskFull) as error:
        if isinstance(error, DiskFull) or _no_space(error):
            raise DiskFull(f"no space left while saving {path}; free some and resume") from error
        raise


@contextmanager
def atomic_folder(target: Path, replace: bool = False) -> Iterator[Path]:
    """A temporary folder beside `target`, which becomes `target` once the block ends and all is on disk.

    On an error nothing is left behind, and what `replace` would have replaced stays. Raises `InputError` where `target`
    exists (unless `replace`) or the disk is full.
    """
    _refuse_existing(target, replace)
    temporary, old = _beside(target), _beside(target, ".old")
    with saving(target):
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            yield temporary
            for path in (*temporary.rglob("*"), temporary):
                _to_disk(path)
            _refuse_existing(target, replace)
            try:
                if target.exists():
                    shutil.rmtree(old, ignore_errors=True)  # of a process that was killed here
                    target.rename(old)
                temporary.rename(target)
            except BaseException:
                if old.exists() and not target.exists():
                    old.rename(target)
                raise
            _to_disk(target.parent)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def write_text_atomic(path: Path, text: str) -> None:
    """`text` in the place of `path`'s content, or that left as it was; raises `InputError` when the disk is full."""
    temporary = _beside(path)
    with saving(path):
        try:
            temporary.write_text(text, encoding="utf-8")
            _to_disk(temporary)
            temporary.replace(path)
            _to_disk(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def write_json_atomic(path: Path, values: Any) -> None:
    """`values` as readable JSON in the place of `path`'s content."""
    write_text_atomic(path, json.dumps(values, indent=2) + "\n")


def link_atomic(path: Path, target: str) -> None:
    """`path` becomes a symbolic link to `target` (relative to `path`'s folder), never missing in between."""
    temporary = _beside(path)
    with saving(path):
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target)
        temporary.replace(path)


def remove_folder(path: Path) -> None:
    """Deletes a folder; killed half-way it leaves a temporary one, not a broken one."""
    temporary = _beside(path)
    path.rename(temporary)
    shutil.rmtree(temporary)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """`folder` is this process's alone within the block; raises `InputError` where it is another's.

    The system ends the lock with the process. Where there are no such locks, as on Windows, nothing is locked.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(folder / ".lock", "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{folder} is being written by another process; let it end, or stop it") from None
        except OSError:  # a file system without locks
            pass
        yield


def remove_leftovers(folder: Path) -> None:
    """Deletes what killed processes left half-written in `folder`."""
    for path in folder.glob(f".*{TEMPORARY}"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def read_json(path: Path, kind: type[dict[str, Any]] = dict) -> dict[str, Any]:
    """The JSON object in `path`, its objects of `kind`; raises `InputError` where it is missing or no JSON object."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"), object_hook=None if kind is dict else kind)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise InputError(f"{path} is not whole JSON ({error}); it is truncated or of another program") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} holds a JSON {type(values).__name__}; an object is needed")
    return values


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """`tensors`, no two of which share memory, as a safetensors file; raises `InputError` when the disk is full."""
    with saving(path):
        whole = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        save_file(whole, path, metadata={"format": "pt", **(metadata or {})})
        path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors makes it private; the folder knows the umask


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU; raises `InputError` where it is missing, truncated or foreign."""
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({os.strerror(error.errno) if error.errno else error})") from None
    except SafetensorError as error:
        raise InputError(f"{path} is truncated or no safetensors file ({error})") from None
    return tensors


def check_tensors(path: Path, tensors: Mapping[str, Tensor], expected: Mapping[str, Collection[int]]) -> None:
    """Raises `InputError` unless `tensors`, read from `path`, have exactly the expected names and shapes."""
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wanted = {name: tuple(shape) for name, shape in expected.items()}
    problems = {
        "misses": [name for name in wanted if name not in found],
        "has unexpected": [name for name in found if name not in wanted],
        "has another shape for": [
            f"{name} ({found[name]} instead of {wanted[name]})"
            for name in wanted
            if name in found and found[name] != wanted[name]
        ],
    }
    said = [f"{what} {_first(names)}" for what, names in problems.items() if names]
    if said:
        raise InputError(f"{path} does not fit the model: it {', '.join(said)}; it was saved with other model settings")


def rounded(state: Mapping[str, Tensor], weights: Weights) -> dict[str, Tensor]:
    """A model's tensors as they are shipped; those that are no floating-point numbers stay as they are.

    `bfloat16`: the nearest ones. `int8`: a matrix M [out, in] becomes integers and float32 scales [out],
    M ~ integers * scales, as in `caddf.quantise`, which finds the same again; all else is float32.
    """
    kept: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            kept[name] = tensor
        elif weights == "int8" and tensor.ndim == 2:
            kept[name], kept[name + SCALES] = integers(tensor)
        else:
            kept[name] = tensor.to(torch.bfloat16 if weights == "bfloat16" else torch.float32)
    return kept


def restored(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model's tensors of those `rounded` from it, read from `path`; int8 ones are float32 again.

    Raises `InputError` where the scales of an int8 tensor are missing, or are no float32 number for each output.
    """
    whole = dict(tensors)
    for name, tensor in tensors.items():
        if tensor.dtype != torch.int8:
            continue
        scales = whole.pop(name + SCALES, None)
        if tensor.ndim != 2 or scales is None or scales.dtype != torch.float32 or scales.shape != tensor.shape[:1]:
            raise InputError(f"{path} holds {name} in int8 and no float32 scale for each row; it is of another program")
        whole[name] = tensor * scales[:, None]
    return whole


def save_model(folder: Path, state: Mapping[str, Tensor], config: dict[str, Any]) -> None:
    """Weights and `config` (`model`: the model's settings; anything else beside it) into `folder`, which exists.

    Wrap it in `atomic_folder`; the tokenizer is the caller's to add.
    """
    save_tensors(folder / "model.safetensors", state)
    written = {"format": FORMAT, "caddf_version": installed_version()}
    write_json_atomic(folder / "config.json", {**written, **config, **written})  # of a model that was loaded, anew


def load_model_config(folder: Path) -> dict[str, Any]:
    """What `save_model` was given as `config`, and `format` and `caddf_version`.

    Raises `InputError` where `folder` is no model folder, or one of another format.
    """
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} is no model folder; one holds config.json, model.safetensors and tokenizer.json")
    config = read_json(folder / "config.json")
    if config.get("format") != FORMAT or not isinstance(config.get("model"), dict):
        raise InputError(
            f"{folder / 'config.json'} has format {config.get('format')!r}; "
            f"a caddf model of format {FORMAT}, with its settings under `model`, is needed"
        )
    return config


def load_state(module: nn.Module, folder: Path) -> None:
    """The weights in a model folder into `module`, whose dtype and device stay; raises `InputError` if they differ."""
    expected, path = {name: tensor.shape for name, tensor in module.state_dict().items()}, folder / "model.safetensors"
    tensors = restored(path, load_tensors(path))
    check_tensors(path, tensors, expected)
    module.load_state_dict(tensors)


def _no_space(error: Exception) -> bool:
    codes = (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, OSError):
        return error.errno in codes
    return any(f"os error {code}" in str(error) for code in codes)  # safetensors has the code in its message alone


def _first(names: list[str], count: int = 3) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def check_writable(name: str, file: str | Path) -> None:
    """Raises `InputError`, which calls it `name`, where no file can be written there."""
    path = Path(file)
    if path.is_dir():
        raise InputError(f"{name} is {file}, which is a folder; give a file to write")
    folder = next(each for each in path.absolute().parents if each.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise InputError(f"{name} is {file}, but nothing can be written to {folder}; give another file")


def _refuse_existing(target: Path, replace: bool) -> None:
    if not replace and (target.exists() or target.is_symlink()):
        raise InputError(f"{target} exists; give a new path, or remove it first")


def named(path: str) -> str:
    """What a temporary file or folder will be called, of its path."""
    return re.sub(rf"/\.([^/]+)-\d+(\.old)?{re.escape(TEMPORARY)}(?=/|$)", r"/\1", f"/{path}")[1:]


def _beside(path: Path, mark: str = "") -> Path:
    return path.with_name(f".{path.name}-{os.getpid()}{mark}{TEMPORARY}")


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
