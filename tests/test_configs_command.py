"""`sk-triton configs`: the user's entries as a list, as a file to contribute, and back."""

from __future__ import annotations

import json
import re

import pytest

from sk_triton import cli
from sk_triton.tuning import shipped, user_file
from sk_triton.tuning.entries import SCHEMA, Entry, dump_sections

from .tuned import H100, entry, origin, other_choice, requests, workload

REQUEST = requests("store", workload())["branch_store"]
KEY, CHOICE = REQUEST.key, other_choice(REQUEST)
ENTRY = entry(CHOICE)


@pytest.fixture
def filled(folder):
    user_file.save(origin(), {KEY: ENTRY, KEY.replace("/n7", "/n0"): entry(None, 1)})
    user_file.save(origin(triton="3.0.0"), {KEY: ENTRY})
    return folder


def run(*options, capsys) -> tuple[int, str, str]:
    code = cli.main(["configs", *map(str, options)])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_list_names_the_file_the_gpus_and_what_is_stale(filled, capsys):
    code, out, _ = run("list", capsys=capsys)
    lines = out.splitlines()
    assert code == 0
    assert lines[0] == str(filled / "tuned.json")
    assert "NVIDIA H100 80GB HBM3 (132 SMs, sm_90;" in lines[1]
    assert lines[1].endswith("2 entries, 1 faster than the analytic choice")
    assert "Triton 3.0.0" in lines[2]
    assert "not used: made for other versions" in lines[2]


def test_list_without_entries_says_how_to_make_them(folder, capsys):
    code, out, _ = run("list", capsys=capsys)
    assert code == 0
    assert "no entries; `sk-triton tune` makes them" in out
    assert not folder.exists()


def test_show_tells_each_entry_and_what_was_tried(filled, capsys):
    code, out, _ = run("show", "--key", "/n7", capsys=capsys)
    assert code == 0
    assert KEY in out
    assert "/n0" not in out
    assert "80.00 µs against 100.00" in out
    assert "predicted 50.00, measured 80.00 µs" in out
    assert "out: 3 spills" in out


def test_show_says_so_where_there_is_nothing(folder, capsys):
    assert run("show", capsys=capsys)[:2] == (0, "no entries; `sk-triton tune` makes them\n")
    failed = Entry(None, 128, 0.0, 0.0, (), "the GPU failed: unspecified launch failure")
    user_file.save(origin(), {KEY: failed})
    assert "  not measured at a batch of 128: the GPU failed: unspecified" in run("show", capsys=capsys)[1]
    assert "no entry whose key contains '/n3'" in run("show", "--key", "/n3", capsys=capsys)[1]


def test_export_of_stale_entries_names_the_option_that_takes_them(folder, tmp_path, capsys):
    user_file.save(origin(triton="3.0.0"), {KEY: ENTRY})
    code, _, err = run("export", tmp_path / "mine.json", capsys=capsys)
    assert code == 1
    assert "no entries to export; 1 are for other versions of the kernels, --all exports these" in err


def test_an_exported_file_is_imported_elsewhere_and_can_be_shipped(filled, tmp_path, capsys, monkeypatch):
    code, out, _ = run("export", tmp_path, capsys=capsys)
    file = tmp_path / "nvidia-h100-80gb-hbm3-132.json"
    assert code == 0
    assert out == f"{file}: 2 entries\n"
    monkeypatch.setattr(shipped, "FOLDER", tmp_path)
    shipped.contributed.cache_clear()
    assert set(shipped.contributed(H100.gpu, H100.processors)) == {origin()}
    shipped.contributed.cache_clear()

    monkeypatch.setenv(user_file.FOLDER_VARIABLE, str(tmp_path / "elsewhere"))
    user_file.save(origin(), {KEY: entry(None)})
    assert run("import", file, capsys=capsys)[0] == 0
    assert user_file.read()[origin()][KEY] == ENTRY


def test_export_writes_over_no_file(filled, tmp_path, capsys):
    (tmp_path / "mine.json").write_text("precious")
    code, _, err = run("export", tmp_path / "mine.json", capsys=capsys)
    assert code == 1
    assert "mine.json" in err
    assert (tmp_path / "mine.json").read_text() == "precious"
    code, out, _ = run("export", "--all", tmp_path / "other.json", capsys=capsys)
    assert code == 0
    assert "3 entries" in out


def test_export_without_entries_says_so(folder, tmp_path, capsys):
    code, _, err = run("export", tmp_path / "mine.json", capsys=capsys)
    assert code == 1
    assert "no entries to export" in err
    assert not (tmp_path / "mine.json").exists()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{ torn", "it is no JSON"),
        (json.dumps({"schema": SCHEMA + 1, "sections": []}), "its schema is 2"),
        (json.dumps({"schema": SCHEMA, "sections": []}), "holds no entry to import"),
        (
            re.sub(r'"BLOCK_CI":\d+', '"BLOCK_CI":-8', dump_sections({origin(): {KEY: ENTRY}})),
            "BLOCK_CI must be between 1 and",
        ),
    ],
)
def test_import_takes_nothing_that_is_unsound(folder, tmp_path, capsys, text, reason):
    (tmp_path / "theirs.json").write_text(text)
    code, _, err = run("import", tmp_path / "theirs.json", capsys=capsys)
    assert code == 2
    assert reason in err
    assert not folder.exists()


@pytest.mark.parametrize(
    ("text", "reason"),
    [("{ torn", "it is no JSON"), (json.dumps({"schema": SCHEMA + 1, "sections": []}), "its schema is 2")],
)
@pytest.mark.parametrize("action", ["list", "show", "export"])
def test_a_damaged_file_is_reported_in_one_line(action, folder, tmp_path, capsys, recwarn, text, reason):
    folder.mkdir()
    (folder / "tuned.json").write_text(text)
    code, out, err = run(action, *[tmp_path / "mine.json"] * (action == "export"), capsys=capsys)
    assert (code, out) == (2, "")
    assert err.startswith(f"sk-triton configs: {folder / 'tuned.json'}: {reason}")
    assert len(err.splitlines()) == 1
    assert not recwarn.list


def test_an_entry_that_is_not_used_is_reported_beside_the_others(filled, capsys, recwarn):
    file = filled / "tuned.json"
    file.write_text(re.sub(r'"BLOCK_CI":\d+', '"BLOCK_CI":-8', file.read_text(), count=1))
    code, out, err = run("list", capsys=capsys)
    assert code == 0
    assert "1 entries, 0 faster than the analytic choice" in out
    assert err.startswith("ignored: ")
    assert "BLOCK_CI must be between 1 and" in err
    assert not recwarn.list


def test_clear_removes_a_damaged_file(folder, capsys, recwarn):
    folder.mkdir()
    (folder / "tuned.json").write_text("{ torn")
    code, _, err = run("clear", capsys=capsys)
    assert code == 0
    assert "tuned.json was put aside as tuned.broken" in err
    assert all(line.startswith("sk-triton configs: ") for line in err.splitlines())
    assert not recwarn.list
    assert run("list", capsys=capsys)[0] == 0


def test_import_of_a_file_that_is_not_there(folder, tmp_path, capsys):
    code, _, err = run("import", tmp_path / "nowhere.json", capsys=capsys)
    assert code == 1
    assert "nowhere.json" in err


@pytest.mark.parametrize("action", ["list", "show", "clear"])
def test_a_folder_that_there_is_not_is_one_line(action, monkeypatch, capsys):
    monkeypatch.setenv(user_file.FOLDER_VARIABLE, "~nosuchuser/x")
    code, _, err = run(action, capsys=capsys)
    assert code == 1
    assert err.splitlines()[-1].startswith("sk-triton configs: SK_TRITON_CACHE_DIR must name a folder")


def test_clear_of_nothing_leaves_nothing(folder, capsys):
    assert run("clear", capsys=capsys)[:2] == (0, f"0 entries removed from {folder / 'tuned.json'}\n")
    assert not folder.exists()


def test_clear_removes_what_is_stale_or_everything(filled, capsys):
    assert run("clear", "--stale", capsys=capsys)[1].startswith("1 entries removed")
    assert set(user_file.read()) == {origin()}
    assert run("clear", capsys=capsys)[1].startswith("2 entries removed")
    assert user_file.read() == {}
