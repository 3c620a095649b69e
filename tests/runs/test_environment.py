"""What a run notes about the code that it was trained by."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from fpcn_dist.runs import environment

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    environment.commit.cache_clear()
    yield
    environment.commit.cache_clear()


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A repository with the library in it, which is used from there."""
    module = tmp_path / "fpcn_dist" / "runs" / "environment.py"
    module.parent.mkdir(parents=True)
    module.touch()
    (module.parents[1] / "__init__.py").touch()
    monkeypatch.setattr(environment, "__file__", str(module))
    git(tmp_path, "init", "--quiet")
    return tmp_path


def git(folder: Path, *words: str) -> str:
    author = ("-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", *author, *words], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def record(folder: Path, *files: str) -> str:
    git(folder, "add", *files)
    git(folder, "commit", "--quiet", "--message", "m")
    return git(folder, "rev-parse", "HEAD")


@needs_git
def test_commit_of_the_checkout(checkout):
    commit = record(checkout, "fpcn_dist")
    (checkout / "untracked").touch()
    assert environment.commit() == commit


@needs_git
def test_commit_with_changed_files(checkout):
    commit = record(checkout, "fpcn_dist")
    (checkout / "fpcn_dist" / "runs" / "environment.py").write_text("changed")
    assert environment.commit() == commit + "+"


@needs_git
def test_an_installation_inside_another_repository_has_no_commit(checkout):
    (checkout / "README").touch()
    record(checkout, "README")
    assert environment.commit() is None


def test_without_git(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment.commit() is None
