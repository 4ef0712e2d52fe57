"""Which Triton is installed, whatever its distribution is called and however its version is written."""

from __future__ import annotations

import importlib.metadata

import pytest

from sk_triton import environment


@pytest.fixture
def distributions(monkeypatch):
    """The installed distributions and their versions; that of module triton is among them."""
    found: dict[str, str] = {}

    def version(name):
        if name not in found:
            raise importlib.metadata.PackageNotFoundError(name)
        return found[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: {"triton": list(found)})
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda name: name)
    environment.triton_version.cache_clear()
    yield found
    environment.triton_version.cache_clear()


@pytest.mark.parametrize("name", ["triton", "pytorch-triton-rocm", "triton-rocm", "triton-windows"])
@pytest.mark.parametrize(
    ("version", "expected"),
    [("3.6.0", (3, 6)), ("3.10.0+git1a2b", (3, 10)), ("3.9rc1", (3, 9)), ("4.0b2", (4, 0)), ("4", (4, 0))],
)
def test_triton_is_found_under_any_name_and_version(name, version, expected, distributions):
    distributions[name] = version
    assert environment.installed_triton() == version
    assert environment.triton_version() == expected


def test_a_triton_of_no_distribution_says_itself_what_it_is(distributions, monkeypatch):
    triton = type("module", (), {"__version__": "3.8.0"})
    monkeypatch.setattr(environment.importlib, "import_module", {"triton": triton}.__getitem__)
    assert environment.triton_version() == (3, 8)


def test_without_triton_there_is_no_version(distributions, monkeypatch):
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda name: None)
    assert environment.installed_triton() is None
    assert environment.triton_version() == (0, 0)
