"""What `sk-triton explain` prints."""

from __future__ import annotations

import json

import pytest

from sk_triton import cli
from sk_triton.bench import explain, results, validation
from sk_triton.bench import speed_of_light as sol
from sk_triton.bench.gpus import find_gpu
from sk_triton.bench.shapes import SEED

from .synthetic_results import some_results
from .versions import needs_narrow_products

H100 = find_gpu("h100")


@pytest.fixture
def command(monkeypatch, tmp_path, capsys, fake_code):
    """Runs `sk-triton explain` on fake code and without committed results; (exit code, output, errors)."""
    monkeypatch.setattr(validation, "RESULTS", tmp_path)
    monkeypatch.setenv("COLUMNS", "160")

    def run(*arguments: str) -> tuple[int, str, str]:
        try:
            code = cli.main(["explain", *arguments])
        except SystemExit as stopped:
            code = stopped.code
        return code, *capsys.readouterr()

    return run


def test_explain_names_times_bounds_configs_and_the_choice(command):
    code, out, _ = command("--shape", "128,128,56,56", "--gpu", "h100")
    assert code == 0
    assert all(name in out for name in (*sol.BOUNDS, "store", "select", "eager", "torch.compile", "floor"))
    assert "StreamConfig(" in out
    assert "choice: recompute: predicted" in out
    assert "not measured: no results of H100 SXM are committed" in out
    _, wide, _ = command("--shape", "8,256,14,14", "--gpu", "h100", "--groups", "1")
    assert "choice: library: predicted" in wide
    assert "the library's 3x3 d2" in wide


def test_explain_in_json(command):
    code, out, _ = command("--stage", "2", "--batch", "4", "--gpu", "a100", "--unit", SEED, "--json")
    data = json.loads(out)
    assert code == 0
    assert (data["gpu"], data["shape"]) == ("A100 80GB", [4, 256, 28, 28])
    assert data["branches"] == ["3x3 g32", "5x5 g32"]
    assert data["measured"] == "not measured"
    store = data["schedules"][0]
    assert store["total_us"] == pytest.approx(sum(step["total_us"] for step in store["steps"]))
    assert set(store["bounds_us"]) == set(sol.BOUNDS)


def test_explain_shows_measurements_where_there_are_some(command, tmp_path):
    (tmp_path / "h100").mkdir()
    measured = some_results(every=True, batches=(8, 128), stages=(1,))
    results.save(measured, tmp_path / "h100" / "layer.json")
    _, out, _ = command("--stage", "1", "--gpu", "h100")
    assert "measured / predicted" in out
    assert "rank correlation (Spearman): " in out
    assert "not measured" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stage", "1", "--gpu", "h10"], "gpu must be one of"),
        (["--shape", "1,2,3", "--gpu", "h100"], "must be N,C,H,W"),
        (["--shape", "0,128,7,7", "--gpu", "h100"], "shape must be four positive sizes"),
        (["--shape", "1,130,7,7", "--gpu", "h100"], "groups must divide"),
        (["--stage", "1", "--gpu", "h100", "--kernels", "3"], "kernels and dilations must be as many"),
        (["--gpu", "h100"], "--shape"),
        (["--stage", "1"], "--gpu"),
    ],
)
def test_explain_refuses_what_it_does_not_know(arguments, message, command):
    code, _, error = command(*arguments)
    assert code == 2
    assert message in error
    assert "Traceback" not in error


@needs_narrow_products
@pytest.mark.usefixtures("fake_code")
def test_the_readme_table_has_a_row_per_stage():
    header, rule, *rows = explain.predicted_markdown().splitlines()
    assert len(rows) == 4
    assert {line.count("|") for line in (header, rule, *rows)} == {header.count("|")}
    assert [row.split("|")[2].strip() for row in rows] == ["recompute", "recompute", "recompute", "store"]
    # 456 instructions of 64 threads and 2048 programs over two branches of 1024 x 7 x 7 outputs of 128 samples.
    assert float(rows[3].split("|")[4]) == pytest.approx(456 * 64 * 4096 / (2 * 128 * 1024 * 7**2), abs=0.05)
