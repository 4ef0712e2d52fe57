"""The wheel holds what the checkout holds, importing it has no side effects, and imports point one way."""

from __future__ import annotations

import ast
import graphlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Folder of the checkout: its package. `sk_triton` comes last: the others are rooms inside it.
ROOMS = {"kernels": "sk_triton.kernels", "bench": "sk_triton.bench", "sk_triton": "sk_triton"}


def source_files() -> dict[str, Path]:
    """Path inside the package, ``sk_triton/kernels/gate.py``, of each Python file of the checkout."""
    return {
        f"{package.replace('.', '/')}/{path.relative_to(ROOT / folder).as_posix()}": path
        for folder, package in ROOMS.items()
        for path in sorted((ROOT / folder).rglob("*.py"))
    }


def python(code: str, *args: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code, *args],
        cwd=cwd,
        env=kept | env,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built offline by this environment's setuptools from a copy without old builds."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in (*ROOMS, "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    python(
        "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])", "..", cwd=source
    )
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel):
    """A folder with the wheel's contents, to be put on the path."""
    folder = wheel.parent / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture
def from_wheel(installed, tmp_path):
    """Runs code with the wheel in a new process, in an empty folder; returns what it prints, read as JSON."""

    def run(code: str, **env: str):
        done = python(code, cwd=tmp_path, PYTHONPATH=str(installed), PYTHONDONTWRITEBYTECODE="1", **env)
        return json.loads(done.stdout)

    return run


def test_the_wheel_holds_every_module_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
    configs = {f"sk_triton/configs/{path.name}" for path in (ROOT / "sk_triton/configs").glob("*.json")}
    assert found == {*source_files(), *configs, "sk_triton/py.typed"}
    packages = {name.removesuffix("/__init__.py") for name in found if name.endswith("/__init__.py")}
    assert packages >= {
        "sk_triton",
        *(f"sk_triton/{p}" for p in ("bench", "configs", "kernels", "schedules", "tuning")),
    }


def distribution_of(folder):
    (distribution,) = importlib.metadata.distributions(name="sk-triton", path=[str(folder)])
    return distribution


def test_metadata(installed):
    distribution = distribution_of(installed)
    assert distribution.metadata["Requires-Python"] == ">=3.10"
    required = [r.partition(">")[0] for r in distribution.requires or [] if "extra ==" not in r]
    assert required == ["filelock", "platformdirs", "torch", "triton"]
    assert {"bench", "test"} <= set(distribution.metadata.get_all("Provides-Extra") or [])
    assert [(entry.name, entry.value) for entry in distribution.entry_points] == [
        ("sk-triton", "sk_triton.cli:main")
    ]


IMPORT_ALONE = """
import contextlib, io, json, os, sys, threading, warnings
import torch

def state():
    return {
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "threads": [threading.active_count(), torch.get_num_threads()],
        "random": torch.get_rng_state().tolist(),
        "dtype": str(torch.get_default_dtype()),
        "tf32": [torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32],
        "grad": torch.is_grad_enabled(),
    }

before, modules, printed = state(), set(sys.modules), io.StringIO()
with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
    warnings.simplefilter("always")
    import sk_triton
print(json.dumps({
    "file": sk_triton.__file__,
    "version": sk_triton.__version__,
    "printed": printed.getvalue(),
    "changed": [name for name, value in state().items() if value != before[name]],
    "modules": sorted(set(sys.modules) - modules),
    "cuda": torch.cuda.is_initialized(),
}))
"""


def test_import_has_no_side_effects(from_wheel, installed, tmp_path):
    found = from_wheel(IMPORT_ALONE, HOME=str(tmp_path), TMPDIR=str(tmp_path))
    assert Path(found["file"]) == installed / "sk_triton/__init__.py"
    assert found["version"] == distribution_of(installed).version
    assert found["printed"] == ""
    assert found["changed"] == []
    assert not found["cuda"]
    assert list(tmp_path.iterdir()) == []
    roots = {name.partition(".")[0] for name in found["modules"]}
    assert not roots & {"triton", "matplotlib", "rich", "timm", "sklearn", "platformdirs", "kernels", "bench"}
    assert "sk_triton.bench" not in found["modules"]


# Every finder of modules, with Triton hidden: as if it were not installed.
WITHOUT_TRITON = """
import json, sys

class Hiding:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] == "triton" else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = map(Hiding, sys.meta_path)
import torch
from sk_triton import SelectiveKernel, SKConv, explain, use_backend

shapes, errors = [], []
for layer in (SKConv(8, M=2, G=4, r=2), SelectiveKernel(8, groups=4)):
    x = torch.randn(2, 8, 5, 4)
    v = layer(x)
    v.sum().backward()
    shapes.append(list(v.shape))
    try:
        with torch.no_grad(), use_backend("triton"):
            layer.eval()(x)
    except RuntimeError as error:
        errors.append(str(error))
print(json.dumps({
    "shapes": shapes,
    "errors": errors,
    "report": str(explain(layer, x)),
    "triton": "triton" in sys.modules,
    "cuda": torch.cuda.is_initialized(),
}))
"""


def test_works_without_triton_and_without_a_gpu(from_wheel):
    found = from_wheel(WITHOUT_TRITON, CUDA_VISIBLE_DEVICES="", HIP_VISIBLE_DEVICES="")
    assert found["shapes"] == [[2, 8, 5, 4]] * 2
    assert len(found["errors"]) == 2
    assert all("Triton is not installed" in error for error in found["errors"])
    assert "backend   reference" in found["report"]
    assert not found["triton"]
    assert not found["cuda"]


IMPORT_ALL = """
import importlib, json, pkgutil, sys
import sk_triton

found = pkgutil.walk_packages(sk_triton.__path__, "sk_triton.")
names = [module.name for module in found if not module.name.endswith("__main__")]
files = [importlib.import_module(name).__file__ for name in names]
print(json.dumps({"names": names, "files": files, "all": sorted(sys.modules)}))
"""


def test_every_module_imports_under_its_own_name_only(from_wheel, installed):
    pytest.importorskip("triton")
    found = from_wheel(IMPORT_ALL)
    assert {"sk_triton.kernels.gate", "sk_triton.bench.commands.bench", "sk_triton.schedules.store"} <= set(
        found["names"]
    )
    assert all(Path(file).is_relative_to(installed / "sk_triton") for file in found["files"])
    assert not {"kernels", "bench"} & set(found["all"])


def test_the_tests_import_no_folder_of_the_checkout_by_its_bare_name():
    for name in ("kernels", "bench"):
        file = getattr(sys.modules.get(name), "__file__", None)
        assert file is None or not Path(file).is_relative_to(ROOT)


def module_name(file: str) -> str:
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


MODULES = {module_name(file): path for file, path in source_files().items()}


def imports(source: str, package: str) -> set[str]:
    """Dotted names that a module of ``package`` imports, at any depth: of ``from a import b``, ``a.b``."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            prefix = ".".join(filter(None, (base, node.module)))
            found |= {f"{prefix}.{alias.name}" for alias in node.names}
    return found


def imports_of(module: str) -> set[str]:
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    return imports(path.read_text(encoding="utf-8"), package)


def room(module: str) -> str:
    return next(package for package in ROOMS.values() if f"{module}.".startswith(f"{package}."))


def members(package: str) -> list[str]:
    return [module for module in MODULES if room(module) == package]


def test_imports_are_found():
    source = "import a.b, c\nfrom d import e\ndef f():\n    from . import g\n    from ..h.i import j as k\n"
    assert imports(source, "p.q") == {"a.b", "c", "d.e", "p.q.g", "p.h.i.j"}
    assert {room(m) for m in ("sk_triton", "sk_triton.kernels_of", "sk_triton.cli")} == {"sk_triton"}
    assert room("sk_triton.kernels.gate") == "sk_triton.kernels"
    assert "sk_triton.kernels.launch.Launch" in imports_of("sk_triton.kernels.gate")
    assert "sk_triton.launching" in imports_of("sk_triton.dispatch")


def test_no_modules_import_each_other_in_a_circle():
    """Not for types alone either, nor inside of functions."""
    graph = {
        module: {name if name in MODULES else name.rpartition(".")[0] for name in imports_of(module)}
        & MODULES.keys() - {module}
        for module in MODULES
    }
    assert "sk_triton.dispatch" in graph["sk_triton.functional"]
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("module", members("sk_triton.kernels"))
def test_a_kernel_imports_torch_triton_and_its_siblings_only(module):
    for name in imports_of(module):
        root = name.partition(".")[0]
        assert root in {"torch", "triton", *sys.stdlib_module_names} or room(name) == "sk_triton.kernels", (
            name
        )


@pytest.mark.parametrize("module", members("sk_triton"))
def test_the_package_imports_torch_and_the_kernels_and_never_the_bench(module):
    # The file of tuned configs: where caches belong, and a lock on it.
    others = {"filelock", "platformdirs"} if module == "sk_triton.tuning.user_file" else set()
    for name in imports_of(module):
        root = name.partition(".")[0]
        assert root in {"torch", "sk_triton", *others, *sys.stdlib_module_names}, name
        assert root != "sk_triton" or room(name) != "sk_triton.bench", name


def names_the_bench(node: ast.AST) -> bool:
    text = node.value if isinstance(node, ast.Constant) else None
    return isinstance(text, str) and text.split(".")[:2] == ["sk_triton", "bench"]


def test_only_the_command_names_the_bench():
    """`sk_triton.cli` imports the bench by name, when a subcommand asks for it."""
    naming = {
        module
        for module in (*members("sk_triton"), *members("sk_triton.kernels"))
        if any(map(names_the_bench, ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8")))))
    }
    assert naming == {"sk_triton.cli"}


IMPLEMENTATIONS = [
    "sk_triton.reference",
    "sk_triton.training",
    *(module for module in MODULES if module.startswith("sk_triton.schedules.")),
]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_implementations_do_not_import_one_another(implementation):
    others = set(IMPLEMENTATIONS) - {implementation}
    modules = [module for module in MODULES if f"{module}.".startswith(f"{implementation}.")]
    assert modules
    for name in {name for module in modules for name in imports_of(module)}:
        assert not any(f"{name}.".startswith(f"{other}.") for other in others), name
