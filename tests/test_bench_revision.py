"""sk_triton at another revision, beside the one that is installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sk_triton
from sk_triton import environment
from sk_triton.bench import results
from sk_triton.bench.measuring import revision
from sk_triton.bench.measuring.revision import RevisionError, revision_source

from .bench_fakes import small_case

INIT = """
from contextlib import nullcontext
from . import later
from .kernels import launch

def use_backend(name):
    return nullcontext()
"""


def git(folder: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path):
    """Two commits of a package that answers 1, then 2, and a third that does not import."""
    git(tmp_path, "init", "-q")
    for folder, file, text in (
        ("sk_triton", "__init__.py", INIT),
        ("sk_triton", "later.py", "VALUE = 1"),
        ("kernels", "__init__.py", ""),
        ("kernels", "launch.py", ""),
    ):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / file).write_text(text)
    for value in ("VALUE = 1", "VALUE = 2", "VALUE ="):
        (tmp_path / "sk_triton" / "later.py").write_text(value + "\n")
        git(tmp_path, "add", ".")
        git(tmp_path, "commit", "-qm", value)
    return tmp_path


def test_revisions_are_imported_beside_each_other_and_leave_nothing_behind(repository):
    path = list(sys.path)
    with (
        revision_source("HEAD~2", repository) as first,
        revision_source("HEAD~1", repository) as second,
    ):
        assert (first.package.later.VALUE, second.package.later.VALUE) == (1, 2)
        assert (first.role, second.role) == (results.REVISION, results.REVISION)
        assert first.key != second.key
        assert "(HEAD~2)" in first.label
        folder = Path(first.package.__file__).parent
        assert (folder / "kernels" / "launch.py").is_file()
    assert not folder.exists()
    assert sys.path == path
    assert not [name for name in sys.modules if name.startswith("sk_triton_at_")]
    assert sys.modules["sk_triton"] is sk_triton


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nosuch", "must be a commit, tag or branch of .*, got 'nosuch'"),
        ("--all", "must be a commit, tag or branch of .*, got '--all'"),
        ("HEAD", "'HEAD' does not import: SyntaxError"),
    ],
)
def test_a_revision_that_cannot_be_measured_says_why(name, words, repository):
    with pytest.raises(RevisionError, match=words), revision_source(name, repository):
        pass
    assert not [name for name in sys.modules if name.startswith("sk_triton_at_")]


def test_an_error_of_the_run_is_not_mistaken_for_the_revisions(repository):
    with pytest.raises(ImportError, match="of the run"), revision_source("HEAD~1", repository):
        raise ImportError("of the run")


def test_without_a_checkout_or_git_there_is_no_revision(tmp_path, monkeypatch):
    with pytest.raises(RevisionError, match="not a git repository"), revision_source("HEAD", tmp_path):
        pass
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RevisionError, match="git, which is not installed"), revision_source("HEAD", tmp_path):
        pass


@pytest.mark.skipif(environment.git_revision().commit is None, reason="not a git checkout")
def test_this_packages_own_revision_computes_the_same():
    with revision_source("HEAD") as source:
        case = small_case()
        layer, x = source.module(case).eval(), torch.randn(1, 32, 7, 7)
        assert type(layer).__module__.startswith("sk_triton_at_")
        installed = revision.Ours().module(case).eval()
        installed.load_state_dict(layer.state_dict())
        with torch.no_grad(), source.scope():
            torch.testing.assert_close(layer(x), installed(x))
            assert "/" in source.runs(layer, x)
