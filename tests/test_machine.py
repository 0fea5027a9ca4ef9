"""What figures say that they were measured on and with."""

import shutil
import subprocess

import pytest

import caddf.machine
from caddf.machine import machine


def test_without_git_no_commit_is_known(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine()["commit"] is None


@pytest.mark.skipif(shutil.which("git") is None, reason="no git")
def test_a_commit_is_that_of_the_repository_that_tracks_the_code(monkeypatch, tmp_path):
    """And not of any other that the package lies in, as where it is installed into a project's folder."""

    def git(*asked: str) -> str:
        told = ["git", "-c", "user.name=A", "-c", "user.email=a@localhost", "-c", "commit.gpgsign=false", *asked]
        return subprocess.run(told, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    monkeypatch.setattr(caddf.machine, "__file__", shutil.copy(caddf.machine.__file__, tmp_path))
    assert machine()["commit"] is None
    git("init")
    git("commit", "--allow-empty", "--message", "Theirs")
    assert machine()["commit"] is None
    git("add", "machine.py")
    git("commit", "--message", "Ours")
    assert machine()["commit"] == git("rev-parse", "HEAD")
