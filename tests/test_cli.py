"""The `sk-triton` command: its subcommands, and how it fails."""

from __future__ import annotations

import errno
import io
import os
import runpy
import subprocess
import sys
import types

import pytest

import sk_triton
from sk_triton import cli, environment


def test_help_lists_the_subcommands_without_importing_them(capsys, monkeypatch):
    monkeypatch.setattr(cli.importlib, "import_module", lambda name: pytest.fail(f"imported {name}"))
    with pytest.raises(SystemExit) as done:
        cli.main(["--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("bench", "doctor", "resources", "traffic"))


def test_no_subcommand_prints_the_help(capsys):
    assert cli.main([]) == 0
    assert "usage: sk-triton" in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit) as done:
        cli.main(["--version"])
    assert done.value.code == 0
    assert sk_triton.__version__ in capsys.readouterr().out


def test_an_unknown_subcommand_is_refused(capsys):
    with pytest.raises(SystemExit) as refusal:
        cli.main(["bnech"])
    assert refusal.value.code == 2
    assert "bench" in capsys.readouterr().err


@pytest.fixture
def subcommand(monkeypatch):
    """Registers a subcommand `probe` whose `run` is given."""

    def register(run):
        module = types.ModuleType("probe_command")
        module.add_arguments = lambda parser: parser.add_argument("--number", type=int, default=1)
        module.run = run
        monkeypatch.setitem(sys.modules, "probe_command", module)
        monkeypatch.setitem(cli.COMMANDS, "probe", cli.Command("probe_command", "a probe"))

    return register


def test_a_subcommand_gets_its_options_and_gives_the_exit_code(subcommand):
    subcommand(lambda args: args.number)
    assert cli.main(["probe", "--number", "7"]) == 7


def raising(error):
    def run(args):
        raise error

    return run


@pytest.mark.parametrize("module", [p.module for p in environment.OPTIONAL_PACKAGES])
def test_a_missing_optional_package_is_one_line_and_exit_code_2(module, subcommand, capsys):
    subcommand(raising(ModuleNotFoundError(f"No module named '{module}.sub'", name=f"{module}.sub")))
    assert cli.main(["probe"]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "pip install" in error


def test_a_missing_module_of_our_own_is_not_hidden(subcommand):
    subcommand(raising(ModuleNotFoundError("No module named 'sk_triton.nothing'", name="sk_triton.nothing")))
    with pytest.raises(ModuleNotFoundError):
        cli.main(["probe"])


def test_ctrl_c_ends_without_a_traceback(subcommand, capsys):
    subcommand(raising(KeyboardInterrupt()))
    assert cli.main(["probe"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(
    ("arguments", "unbuffered"),
    [(["--help"], ""), (["doctor", "--help"], ""), (["configs", "list"], ""), (["configs", "list"], "1")],
)
def test_output_that_is_closed_early_ends_without_a_traceback(arguments, unbuffered):
    with subprocess.Popen(
        [sys.executable, "-m", "sk_triton", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
    ) as process:
        process.stdout.close()  # long before anything is printed
        error = process.stderr.read()
    assert error == ""
    assert process.returncode == cli.CLOSED_OUTPUT


def printing(args):
    print("5 \u00b5s")
    print("5 \u00b5s", file=sys.stderr)
    return 0


def test_what_an_outputs_encoding_does_not_have_is_a_question_mark(subcommand, monkeypatch):
    subcommand(printing)
    outputs = [io.TextIOWrapper(io.BytesIO(), "ascii", newline="\n") for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", outputs[0])
    monkeypatch.setattr(sys, "stderr", outputs[1])
    assert cli.main(["probe"]) == 0
    outputs[1].flush()
    assert [output.buffer.getvalue() for output in outputs] == [b"5 ?s\n"] * 2


def test_no_output_at_all_is_no_failure(subcommand, monkeypatch):
    subcommand(printing)
    monkeypatch.setattr(sys, "stdout", None)  # as Python starts with after `>&-`
    assert cli.main(["probe"]) == 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
@pytest.mark.parametrize("at_once", [False, True])
def test_output_that_is_full_is_one_line_and_exit_code_1(at_once, subcommand, monkeypatch, capsys):
    subcommand(lambda args: print("words") or 0)
    with io.TextIOWrapper(open("/dev/full", "wb", buffering=0), write_through=at_once) as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert cli.main(["probe"]) == cli.FAILED
    assert capsys.readouterr().err == f"sk-triton: [Errno {errno.ENOSPC}] {os.strerror(errno.ENOSPC)}\n"


def test_another_error_of_the_system_is_not_hidden(subcommand):
    subcommand(raising(FileNotFoundError("a file of our own")))
    with pytest.raises(FileNotFoundError):
        cli.main(["probe"])


def test_the_bench_package_runs_as_a_module(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["python -m sk_triton.bench", "--help"])
    with pytest.raises(SystemExit) as done:
        runpy.run_module("sk_triton.bench", run_name="__main__")
    assert done.value.code == 0
    assert "--quick" in capsys.readouterr().out


def test_optional_packages_are_imported_only_by_the_subcommand_that_needs_them():
    code = (
        "import sys; from sk_triton import cli; cli.main([]); "
        "print(sorted({'rich', 'matplotlib', 'sklearn', 'timm', 'sk_triton.bench'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("command", ["explain", "tune", "traffic"])
def test_the_options_are_told_without_numpy(command):
    code = (
        "import sys; sys.modules['numpy'] = None; from sk_triton import cli; "
        f"sys.exit(cli.main([{command!r}, '--help']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert f"usage: sk-triton {command}" in done.stdout
