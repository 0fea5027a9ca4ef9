"""What is on disk is whole, or it is not there; what is damaged is named."""

import errno
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from caddf.checkpoint import (
    atomic_folder,
    check_tensors,
    check_writable,
    link_atomic,
    load_model_config,
    load_state,
    load_tensors,
    read_json,
    remove_leftovers,
    save_model,
    save_tensors,
    saving,
    write_json_atomic,
)
from caddf.errors import InputError


def test_a_folder_appears_whole(tmp_path):
    target = tmp_path / "deep" / "model"
    with atomic_folder(target) as folder:
        (folder / "a").write_text("1")
        assert not target.exists()
    assert [path.name for path in target.iterdir()] == ["a"]
    assert [path.name for path in target.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("replace", [False, True])
def test_an_error_leaves_what_was_there(tmp_path, error, replace):
    target = tmp_path / "model"
    if replace:
        target.mkdir()
        (target / "old").touch()
    with pytest.raises(error), atomic_folder(target, replace) as folder:
        (folder / "a").write_text("half")
        raise error
    assert sorted(path.name for path in tmp_path.rglob("*")) == (["model", "old"] if replace else [])


def test_an_existing_folder_is_replaced_only_when_asked(tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    (target / "old").touch()
    with pytest.raises(InputError, match=r"model exists"), atomic_folder(target):
        raise AssertionError("the block must not run")
    with atomic_folder(target, replace=True) as folder:
        (folder / "new").touch()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["model", "new"]


@pytest.mark.parametrize("at", ["before", "behind", "taken"])
def test_what_would_have_been_replaced_stays_whenever_it_is_interrupted(tmp_path, monkeypatch, at):
    """Around the rename that puts it aside, and where somebody else takes its place then."""
    target, rename = tmp_path / "model", Path.rename
    target.mkdir()
    (target / "old").touch()

    def interrupted(self, other):
        if self != target:
            return rename(self, other)
        if at != "before":
            rename(self, other)
        if at == "taken":
            self.mkdir()
            return (self / "theirs").touch()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(OSError if at == "taken" else KeyboardInterrupt):
        patch.setattr(Path, "rename", interrupted)
        with atomic_folder(target, replace=True) as folder:
            (folder / "new").touch()
    assert [path.name for path in tmp_path.rglob("old")] == ["old"] and not list(tmp_path.rglob("new"))
    assert (target / "old").exists() or at == "taken"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_said(tmp_path, code):
    with pytest.raises(InputError, match=r"no space left while saving .*model; free some and resume"):
        with atomic_folder(tmp_path / "model"):
            raise OSError(code, "full")
    assert not list(tmp_path.iterdir())
    with pytest.raises(PermissionError), saving(tmp_path):
        raise PermissionError(errno.EACCES, "no")


def test_safetensors_errors_on_a_full_disk_are_understood(tmp_path, monkeypatch):
    from safetensors import SafetensorError

    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("caddf.checkpoint.save_file", full)
    with pytest.raises(InputError, match=r"no space left while saving .*/x\.safetensors"):
        save_tensors(tmp_path / "x.safetensors", {"a": torch.zeros(2)})
    with (
        pytest.raises(InputError, match=r"no space left while saving .*/model; "),
        atomic_folder(tmp_path / "model") as at,
    ):
        save_tensors(at / "x.safetensors", {"a": torch.zeros(2)})


def test_json_is_replaced_whole(tmp_path):
    path = tmp_path / "x.json"
    write_json_atomic(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json_atomic(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize("text", ["", '{"a": ', "[1]", "\ufeff{}"])
def test_damaged_json_is_named(tmp_path, text):
    (tmp_path / "x.json").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"x\.json"):
        read_json(tmp_path / "x.json")


def test_links_move_and_leftovers_go(tmp_path):
    for name in ("a", "b", ".a-1.tmp", ".b-1.old.tmp", ".keep"):
        (tmp_path / name).mkdir()
    (tmp_path / ".c.json-1.tmp").touch()
    (tmp_path / ".latest-1.tmp").symlink_to("a")
    for name in ("a", "b"):
        link_atomic(tmp_path / "latest", name)
        assert (tmp_path / "latest").readlink().name == name
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".keep", "a", "b", "latest"]


def test_tensors_come_back_bit_for_bit(tmp_path):
    tensors = {
        "double": torch.randn(3, 4, dtype=torch.float64),
        "half": torch.randn(5).bfloat16(),
        "transposed": torch.randn(2, 3).T,
        "bytes": torch.arange(7, dtype=torch.uint8),
        "scalar": torch.tensor(2.0),
        "nothing": torch.zeros(0, 3),
    }
    path = tmp_path / "x.safetensors"
    save_tensors(path, tensors)
    loaded = load_tensors(path)
    check_tensors(path, loaded, {name: tensor.shape for name, tensor in tensors.items()})
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor)


@pytest.mark.parametrize("cut", [slice(0, -1), slice(0, 20), slice(0, 0), slice(3, None)])
def test_a_truncated_or_foreign_file_is_named(tmp_path, cut):
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"a": torch.randn(10)})
    path.write_bytes(path.read_bytes()[cut])
    with pytest.raises(InputError, match=r"x\.safetensors is truncated or no safetensors file"):
        load_tensors(path)


def test_other_tensors_are_named(tmp_path):
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"a": torch.zeros(2), "b": torch.zeros(3), **{f"z{i}": torch.zeros(1) for i in range(5)}})
    with pytest.raises(InputError) as raised:
        check_tensors(path, load_tensors(path), {"a": (2,), "b": (4,), "c": (1,)})
    assert "misses c, has unexpected z0, z1, z2 and 2 more, has another shape for b ((3,) instead of (4,))" in str(
        raised.value
    )
    with pytest.raises(InputError, match=r"nowhere\.safetensors cannot be read \(No such file"):
        load_tensors(tmp_path / "nowhere.safetensors")


def test_a_model_folder_round_trips(tmp_path):
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    save_model(tmp_path, model.state_dict(), {"method": "m", "model": {"width": 3}, "data": {"name": "d"}})
    config = load_model_config(tmp_path)
    assert config == {
        "format": 1,
        "caddf_version": config["caddf_version"],
        "method": "m",
        "model": {"width": 3},
        "data": {"name": "d"},
    }
    load_state(other, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    with pytest.raises(InputError, match="does not fit the model"):
        load_state(nn.Linear(4, 2), tmp_path)


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(InputError, match="is no model folder"):
        load_model_config(tmp_path)
    for values in ({"format": 2, "model": {}}, {"format": 1}, {"architectures": ["GPT2LMHeadModel"]}):
        write_json_atomic(tmp_path / "config.json", values)
        with pytest.raises(InputError, match=r"config\.json has format"):
            load_model_config(tmp_path)


def test_what_cannot_be_written_is_said_before_work(tmp_path):
    check_writable("record", tmp_path / "new" / "folder" / "file.json")
    with pytest.raises(InputError, match=r"record is .*, which is a folder; give a file to write"):
        check_writable("record", tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"out is .*, but nothing can be written to .*; give another file"):
        check_writable("out", tmp_path / "file" / "page.html")
