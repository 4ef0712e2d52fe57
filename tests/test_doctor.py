"""`sk-triton doctor`, and the facts about the machine that it and the benchmark share."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import re

import pytest
import torch

import sk_triton
from sk_triton import cli, doctor, environment
from sk_triton.environment import OptionalPackage
from sk_triton.tuning import user_file
from sk_triton.tuning.entries import SCHEMA

from .tuned import entry, origin, requests, workload

TIMM = next(package for package in environment.OPTIONAL_PACKAGES if package.module == "timm")
TRITON = next(package for package in environment.OPTIONAL_PACKAGES if package.module == "triton")
ABSENT = OptionalPackage("sk_triton_absent", "sk-triton-absent", "bench", "nothing")


def test_the_report_names_every_package_the_devices_and_the_backend(capsys):
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    for name in ("python", "sk_triton", "torch", "triton", "timm", "rich", "matplotlib", "scikit-learn"):
        assert f"  {name} " in text
    assert "  nvidia-ml-py" in text
    assert torch.__version__ in text
    assert "Backend that `auto` takes" in text
    assert "SKConv: " in text
    assert "SelectiveKernel: " in text


def test_without_a_gpu_auto_takes_a_schedule_of_the_cpu_and_says_which():
    states = [state for state in doctor.inspect_backends() if state.device == "cpu"]
    assert [state.layer for state in states] == ["SKConv", "SelectiveKernel"]
    assert all(state.backend == "torch" and state.works for state in states)
    assert all(state.reason.startswith("schedule ") for state in states)


def test_a_layer_that_does_not_run_is_reported_and_the_exit_code_says_so(monkeypatch, capsys):
    def broken(*arguments):
        raise OSError("libcuda.so not found\nmore")

    monkeypatch.setattr(sk_triton, "explain", broken)
    assert cli.main(["doctor"]) == 1
    assert "OSError: libcuda.so not found" in capsys.readouterr().out


def test_every_package_that_the_benchmark_needs_is_looked_for():
    requirements = importlib.metadata.requires("sk-triton")
    wanted = {re.match(r"[\w-]+", line)[0] for line in requirements if 'extra == "bench"' in line}
    known = {package.distribution for package in environment.OPTIONAL_PACKAGES if package.extra == "bench"}
    assert wanted <= known | {"numpy"}  # which matplotlib and scikit-learn bring


def test_a_missing_package_comes_with_its_pip_line():
    state = doctor.inspect_package(ABSENT)
    assert (state.version, state.trouble) == (None, "not installed")
    lines = doctor.report([state], [])
    assert lines[lines.index("To mend") + 1].strip().startswith("pip install ")


def test_an_old_package_is_reported(monkeypatch):
    monkeypatch.setattr(environment, "version", lambda name: "0.4.12")
    state = doctor.inspect_package(TIMM)
    assert state.trouble == "older than 1.0.9"
    assert "pip install" in state.remedy


def test_triton_is_found_under_the_name_that_amds_pytorch_brings(monkeypatch):
    versions = {"pytorch-triton-rocm": "3.5.0+rocm"}
    monkeypatch.setattr(environment, "version", versions.get)
    assert doctor.inspect_package(TRITON) == doctor.PackageState(TRITON, "3.5.0+rocm")


def test_a_package_that_does_not_import_is_reported(monkeypatch):
    def broken(name):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(importlib, "import_module", broken)
    assert "operator torchvision::nms" in doctor.inspect_package(TIMM).trouble


def test_nothing_to_mend_is_not_mentioned():
    states = [doctor.PackageState(TIMM, "1.0.31")]
    assert "To mend" not in doctor.report(states, [])


def tuned_row() -> str:
    (row,) = (line for line in doctor.report([], []) if line.startswith("  tuned "))
    return " ".join(row.split())


def test_a_folder_for_tuned_configs_that_there_is_not_is_told(monkeypatch):
    monkeypatch.setenv(user_file.FOLDER_VARIABLE, "~nosuchuser/x")
    assert tuned_row().startswith(
        "tuned not used: SK_TRITON_CACHE_DIR must name a folder, got '~nosuchuser/x'"
    )


def test_tuned_configs_are_counted_those_of_this_version_apart(folder):
    file = folder / "tuned.json"
    assert tuned_row() == f"tuned {file}: 0 entries, 0 current"
    key = requests("store", workload())["branch_store"].key
    user_file.save(origin(), {key: entry(None), key.replace("/n7", "/n0"): entry(None, 1)})
    user_file.save(origin(triton="3.0.0"), {key: entry(None)})
    assert tuned_row() == f"tuned {file}: 3 entries, 2 current"
    file.write_text(file.read_text().replace('"analytic_us":100.0', '"analytic_us":-1', 1))
    assert tuned_row().startswith(f"tuned {file}: 2 entries, 1 current, 1 damaged; the first: ")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{ torn", "damaged: it is no JSON"),
        (json.dumps({"schema": SCHEMA + 1, "sections": []}), "not used: its schema is 2"),
    ],
)
def test_tuned_configs_that_cannot_be_read_are_reported_without_a_warning(folder, text, words, recwarn):
    folder.mkdir()
    (folder / "tuned.json").write_text(text)
    assert tuned_row().startswith(f"tuned {folder / 'tuned.json'}: {words}")
    assert not recwarn.list


def test_a_file_of_tuned_configs_that_may_not_be_read_is_reported(folder):
    (folder / "tuned.json").mkdir(parents=True)
    assert "tuned.json" in tuned_row()
    assert "not used: " in tuned_row() or "damaged: " in tuned_row()


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"built": "the CPU only", "driver": None}, "built for the CPU only"),
        ({"built": "CUDA 13.2", "driver": None}, "no driver was found"),
        ({"built": "CUDA 13.2", "driver": "570.86"}, "sees no device with driver 570.86"),
    ],
)
def test_why_there_is_no_gpu(facts, expected, monkeypatch):
    monkeypatch.setattr(environment, "torch_built_for", lambda: facts["built"])
    monkeypatch.setattr(environment, "driver_version", lambda: facts["driver"])
    monkeypatch.setattr(environment, "gpu_names", list)
    assert expected in "\n".join(doctor.report([], []))


def test_the_pip_line_fits_how_sk_triton_was_installed(monkeypatch, tmp_path):
    monkeypatch.setattr(environment, "CLONE_DIR", tmp_path)
    assert environment.install_command(TIMM) == "pip install 'sk-triton[bench]'"
    (tmp_path / "pyproject.toml").touch()
    assert environment.install_command(TIMM) == f"pip install -e '{tmp_path}[bench]'"
    monkeypatch.chdir(tmp_path)
    assert environment.install_command(TIMM) == "pip install -e '.[bench]'"
    assert environment.install_command(TRITON) == "pip install 'triton>=3.4'"


@pytest.mark.parametrize(
    ("installed", "required", "older"),
    [
        ("2.8.0+cu128", "2.8", False),
        ("2.10.1", "2.8", False),
        ("1.0.9", "1.0.31", True),
        ("1.0", "1.0.0", False),
        ("3.4.0rc1", "3.5", True),
    ],
)
def test_versions_compare_as_numbers(installed, required, older):
    assert environment.is_older(installed, required) == older


def test_a_wheel_in_somebody_elses_repository_is_not_stamped_with_its_commit(monkeypatch, tmp_path):
    monkeypatch.setattr(environment, "CLONE_DIR", tmp_path)
    assert environment.git_revision() == environment.Revision(None, None)


def test_a_clone_is_stamped_with_its_commit_and_whether_it_was_changed(monkeypatch, tmp_path):
    (tmp_path / "pyproject.toml").touch()
    answers = {"ls-files": "sk_triton/environment.py", "status": " M README.md", "rev-parse": "abc123"}
    monkeypatch.setattr(environment, "CLONE_DIR", tmp_path)
    monkeypatch.setattr(environment, "_git", lambda *arguments: answers[arguments[0]])
    assert environment.git_revision() == environment.Revision("abc123", True)
    answers["status"] = ""
    assert environment.git_revision() == environment.Revision("abc123", False)


def test_a_command_that_is_absent_gives_none():
    assert environment._output("sk-triton-no-such-command") is None
