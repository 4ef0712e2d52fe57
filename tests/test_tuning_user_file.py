"""The user's file of tuned configs: where it is, who may write at once, and everything that can be wrong with it."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from sk_triton.kernels.config import GateConfig
from sk_triton.tuning import user_file
from sk_triton.tuning.entries import (
    MAX_BYTES,
    SCHEMA,
    Entry,
    Trial,
    dump_config,
    dump_entry,
    load_sections,
)

from .tuned import entry, origin, other_choice, requests, workload

REQUEST = requests("store", workload())["branch_store"]
KEY, CHOICE = REQUEST.key, other_choice(REQUEST)
OTHER_KEY = KEY.replace("/n7", "/n0")


def save(key=KEY, choice=CHOICE, **changes) -> bool:
    return user_file.save(origin(**changes), {key: entry(choice, 1 if key == OTHER_KEY else 128)})


def content(folder) -> dict:
    return json.loads((folder / "tuned.json").read_text())


def test_the_folder_is_the_platforms_or_the_one_that_is_asked_for(monkeypatch, tmp_path):
    monkeypatch.setenv(user_file.FOLDER_VARIABLE, str(tmp_path))
    assert user_file.path() == tmp_path / "tuned.json"
    monkeypatch.setenv(user_file.FOLDER_VARIABLE, "~/here")
    assert user_file.path() == Path.home() / "here/tuned.json"
    for unset in ("", None):
        monkeypatch.delenv(user_file.FOLDER_VARIABLE) if unset is None else monkeypatch.setenv(
            user_file.FOLDER_VARIABLE, unset
        )
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert user_file.path().name == "tuned.json"
        assert "sk_triton" in user_file.path().parts
        if sys.platform == "linux":
            assert user_file.path() == tmp_path / "sk_triton/tuned.json"


def test_what_is_saved_is_read_back_and_the_rest_stays(folder):
    assert user_file.read() == {}
    assert save()
    assert save(OTHER_KEY, None)
    assert save(triton="3.0.0")
    assert user_file.read() == {
        origin(): {KEY: entry(CHOICE), OTHER_KEY: entry(None, 1)},
        origin(triton="3.0.0"): {KEY: entry(CHOICE)},
    }
    assert [path.name for path in folder.iterdir() if not path.name.endswith(".lock")] == ["tuned.json"]


def test_the_file_is_read_again_only_once_it_has_changed(folder, monkeypatch):
    save()
    reads = []
    read_text = user_file.read_text
    monkeypatch.setattr(user_file, "read_text", lambda file: reads.append(file) or read_text(file))
    for _ in range(3):
        assert user_file.read()[origin()][KEY].choice == CHOICE
    assert len(reads) == 1
    raw = content(folder)
    raw["sections"] = []
    (folder / "tuned.json").write_text(json.dumps(raw))
    assert user_file.read() == {}
    assert len(reads) == 2


# Writes many entries, one by one, as two tuning processes would.
WRITER = """
import sys
from dataclasses import replace
from sk_triton.tuning import user_file
from sk_triton.tuning.entries import load_sections
print("ready", flush=True)
first, text = int(sys.argv[1]), sys.stdin.read()
((origin, entries),) = load_sections(text)[0].items()
((key, entry),) = entries.items()
prefix = key.rpartition("n")[0]
for n in range(first, first + 20):
    assert user_file.save(origin, {f"{prefix}n{n}": replace(entry, n=1 << n)})
"""


def test_two_processes_that_write_at_once_lose_nothing(folder):
    save(OTHER_KEY)
    text = (folder / "tuned.json").read_text()
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(first)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": ""},
            cwd=folder.parent,
        )
        for first in (10, 50)
    ]
    assert [writer.stdout.readline() for writer in writers] == ["ready\n"] * 2
    for writer in writers:
        writer.stdin.write(text)
        writer.stdin.close()
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0]
    for writer in writers:
        writer.stdout.close()
    numbers = {int(key.rpartition("n")[2]) for key in content(folder)["sections"][0]["entries"]}
    assert numbers == {0, *range(10, 30), *range(50, 70)}
    assert len(user_file.read()[origin()]) == 41


def test_a_process_that_dies_while_it_writes_leaves_the_old_file(folder, monkeypatch):
    save()
    before = (folder / "tuned.json").read_text()

    class DiedError(BaseException):
        pass

    def die(*args):
        raise DiedError

    monkeypatch.setattr(user_file.os, "replace", die)
    with pytest.raises(DiedError):
        save(OTHER_KEY)
    assert (folder / "tuned.json").read_text() == before
    assert not list(folder.glob(".tuned.json-*"))


def full_disk(folder, monkeypatch):
    def fsync(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(user_file.os, "fsync", fsync)


def no_folder(folder, monkeypatch):
    folder.parent.joinpath("tuned").write_text("a file where the folder should be")


def held_lock(folder, monkeypatch):
    import filelock

    folder.mkdir()
    monkeypatch.setattr(user_file, "LOCK_SECONDS", 0.05)
    lock = filelock.FileLock(folder / "tuned.json.lock")
    lock.acquire()
    monkeypatch.setattr(user_file, "_held_by_the_test", lock, raising=False)


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [(full_disk, "No space left"), (no_folder, "tuned"), (held_lock, "another process has held")],
)
def test_what_cannot_be_written_is_warned_of_once_and_the_run_goes_on(folder, monkeypatch, break_it, reason):
    break_it(folder, monkeypatch)
    with pytest.warns(RuntimeWarning, match=reason) as caught:
        assert [save(), save()] == [False, False]
    assert len(caught) == 1


def nested(depth):
    return "[" * depth + "]" * depth


def with_entry(**changes) -> str:
    raw = {**dump_entry(entry(CHOICE)), **changes}
    section = {**vars(origin()), "entries": {KEY: raw}}
    return json.dumps({"schema": SCHEMA, "sections": [section]})


def with_section(**changes) -> str:
    return json.dumps({"schema": SCHEMA, "sections": [{**vars(origin()), "entries": {}, **changes}]})


SOUND = with_entry()
BROKEN = {
    "empty": "",
    "truncated": SOUND[: len(SOUND) // 2],
    "another type": "[]",
    "a number": "7",
    "no schema": json.dumps({"sections": []}),
    "a text as schema": json.dumps({"schema": "1", "sections": []}),
    "schema true": json.dumps({"schema": True, "sections": []}),
    "no sections": json.dumps({"schema": SCHEMA}),
    "sections of another type": json.dumps({"schema": SCHEMA, "sections": {}}),
    "a section of another type": json.dumps({"schema": SCHEMA, "sections": [3]}),
    "deep": nested(100_000),
    "deep inside": json.dumps({"schema": SCHEMA, "sections": []}).replace("[]", nested(100_000)),
    "not finite": SOUND.replace("80.0", "NaN"),
    "infinite": SOUND.replace("80.0", "-Infinity"),
    "a huge integer": SOUND.replace("80.0", "9" * 5000),
    "too large": " " * (MAX_BYTES + 1),
    "not a text": b"\xff\xfe\x00{",
    "entries of another type": with_section(entries=[]),
    "an unknown field": with_section(surprise=1),
    "control characters": with_section(gpu="NVIDIA\x1b[2J"),
    "a long name": with_section(gpu="H" * 10_000),
    "no processors": with_section(processors=0),
    "processors true": with_section(processors=True),
    "newer": json.dumps({"schema": SCHEMA + 1, "sections": []}),
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_ignored_with_one_warning(folder, text):
    folder.mkdir()
    (folder / "tuned.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.warns(RuntimeWarning, match="are not used") as caught:
        assert [user_file.read(), user_file.read()] == [{}, {}]
    assert len(caught) == 1


def config(**changes) -> dict:
    return {**dump_entry(entry(CHOICE))["choice"], **changes}


@pytest.mark.parametrize(
    "raw",
    [
        with_entry(choice=config(BLOCK_H=0)),
        with_entry(choice=config(BLOCK_H=-4)),
        with_entry(choice=config(BLOCK_H=1 << 40)),
        with_entry(choice=config(BLOCK_H=4.0)),
        with_entry(choice=config(BLOCK_H="4")),
        with_entry(choice=config(BLOCK_H=True)),
        with_entry(choice=config(BLOCK_H=None)),
        with_entry(choice=config(surprise=1)),
        with_entry(choice={"kernel": "stream"}),
        with_entry(choice=config(kernel="../../etc/passwd")),
        with_entry(choice=config(kernel=["stream"])),
        with_entry(choice="store"),
        with_entry(choice=[1]),
        with_entry(choice=dump_config(GateConfig(16, 16, 16, 16))),
        with_entry(tuned_us=-1),
        with_entry(tuned_us=1e999).replace("Infinity", "1e999"),
        with_entry(tuned_us="fast"),
        with_entry(analytic_us=10**400),
        with_entry(analytic_us=-(10**400)),
        with_entry(n=0),
        with_entry(n=64),
        with_entry(n=129),
        with_entry(n=128.0),
        with_entry(failure=None),
        with_entry(failure="\x1b[2J"),
        with_entry(failure="the GPU failed"),
        with_entry(trials={}),
        with_entry(trials=[3]),
        with_entry(trials=[{"choice": config(), "predicted_us": 1, "measured_us": 1, "dropped": "\x1b[2J"}]),
        with_entry(surprise=1),
        SOUND.replace(KEY, "../../etc/passwd"),
        SOUND.replace(KEY, KEY.replace("branch_store", "branch_grad")),
        SOUND.replace(KEY, KEY.replace("inference", "training")),
        SOUND.replace(KEY, KEY + "/../x"),
        SOUND.replace(KEY, "inference/branch_store/float16/" + "a" * 10_000 + "/1x1/n0"),
        SOUND.replace(KEY, "inference/schedule/float16/c1/1x1/n0"),
        with_entry(choice=None).replace(KEY, "inference/schedule/float16/c1/1x1/n7"),
    ],
)  # fmt: skip
def test_a_hostile_entry_is_ignored_and_the_others_serve(folder, raw):
    both = json.loads(raw, parse_constant=float)
    both["sections"][0]["entries"][OTHER_KEY] = dump_entry(entry(None, 1))
    folder.mkdir()
    (folder / "tuned.json").write_text(json.dumps(both).replace("Infinity", "1e999"))
    with pytest.warns(RuntimeWarning, match="1 entries of .* are not used; the first: "):
        assert user_file.read() == {origin(): {OTHER_KEY: entry(None, 1)}}


def test_a_file_that_is_no_file_does_not_block(folder):
    folder.mkdir()
    os.mkfifo(folder / "tuned.json")
    with pytest.warns(RuntimeWarning, match="it is no plain file"):
        assert user_file.read() == {}


def test_a_folder_in_the_files_place_is_ignored(folder):
    (folder / "tuned.json").mkdir(parents=True)
    with pytest.warns(RuntimeWarning, match="are not used"):
        assert user_file.read() == {}
    with pytest.warns(RuntimeWarning, match="are not kept"):
        assert not save()


def test_a_broken_file_is_put_aside_when_new_entries_come(folder):
    folder.mkdir()
    (folder / "tuned.json").write_text("{ torn")
    with pytest.warns(RuntimeWarning, match="put aside as tuned.broken"):
        assert save()
    assert (folder / "tuned.broken").read_text() == "{ torn"
    assert user_file.read() == {origin(): {KEY: entry(CHOICE)}}


def test_what_was_put_aside_before_stays(folder):
    folder.mkdir()
    (folder / "tuned.broken").write_text("precious")
    (folder / "tuned.json").write_text("{ torn")
    with pytest.warns(RuntimeWarning, match="put aside as tuned.broken1"):
        assert save()
    assert (folder / "tuned.broken").read_text() == "precious"
    assert (folder / "tuned.broken1").read_text() == "{ torn"


def test_a_home_that_there_is_not_is_warned_of_and_the_run_goes_on(monkeypatch):
    monkeypatch.setenv(user_file.FOLDER_VARIABLE, "~nosuchuser/x")
    with pytest.warns(RuntimeWarning, match="SK_TRITON_CACHE_DIR must name a folder, got '~nosuchuser/x'"):
        assert (user_file.read(), save()) == ({}, False)
    with pytest.raises(OSError, match="nosuchuser"):
        user_file.path()


def test_the_file_never_grows_larger_than_can_be_read(folder, monkeypatch):
    """Entries for other versions make room; those of this one are not given up for new ones."""
    save(triton="3.0.0")
    save()
    size = len(user_file.to_json(content(folder)))
    monkeypatch.setattr(user_file, "MAX_BYTES", size)
    with pytest.warns(RuntimeWarning, match="for other versions of the kernels is dropped"):
        assert save(OTHER_KEY)
    kept = {origin(): {KEY: entry(CHOICE), OTHER_KEY: entry(CHOICE, 1)}}
    assert user_file.read() == kept
    monkeypatch.setattr(user_file, "MAX_BYTES", len((folder / "tuned.json").read_text()))
    with pytest.warns(
        RuntimeWarning, match="it would be larger than 0 MiB; `sk-triton configs clear` empties it"
    ):
        assert not user_file.save(origin(), {KEY.replace("/n7", "/n6"): entry(CHOICE, 64)})
    assert user_file.read() == kept


@pytest.mark.parametrize("mode", [0o644, 0o640])
def test_who_may_read_the_file_stays_and_a_link_stays_one(folder, tmp_path, mode):
    save()
    umask = os.umask(0)
    os.umask(umask)
    assert (folder / "tuned.json").stat().st_mode & 0o777 == 0o666 & ~umask
    elsewhere = tmp_path / "elsewhere.json"
    (folder / "tuned.json").rename(elsewhere)
    elsewhere.chmod(mode)
    (folder / "tuned.json").symlink_to(elsewhere)
    save(OTHER_KEY)
    assert (folder / "tuned.json").is_symlink()
    assert elsewhere.stat().st_mode & 0o777 == mode
    assert set(json.loads(elsewhere.read_text())["sections"][0]["entries"]) == {KEY, OTHER_KEY}


def test_a_newer_versions_file_is_never_changed(folder):
    folder.mkdir()
    newer = json.dumps({"schema": SCHEMA + 1, "sections": [], "more": 1})
    (folder / "tuned.json").write_text(newer)
    with pytest.warns(RuntimeWarning, match="its schema is 2; this version of sk_triton reads 1"):
        assert not save()
    assert (folder / "tuned.json").read_text() == newer


def test_entries_that_this_version_does_not_understand_stay_in_the_file(folder):
    save()
    raw = content(folder)
    raw["sections"][0]["entries"]["inference/branch_future/x"] = {"new": 1}
    (folder / "tuned.json").write_text(json.dumps(raw))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save(OTHER_KEY)
    assert set(content(folder)["sections"][0]["entries"]) == {KEY, OTHER_KEY, "inference/branch_future/x"}


def test_what_a_driver_says_in_colours_and_lines_can_be_read_back(folder):
    noisy = Trial(CHOICE, None, None, "\x1b[31mfailed\x1b[0m\nat line 1" + "!" * 1000)
    user_file.save(origin(), {KEY: Entry(None, 128, 1e-4, 1e-4, (noisy,))})
    (trial,) = user_file.read()[origin()][KEY].trials
    assert trial.dropped.startswith(" [31mfailed [0m at line 1!!!")


def test_clearing_removes_what_is_not_to_be_kept(folder):
    save()
    save(triton="3.0.0")
    assert user_file.clear(lambda found: found == origin())
    assert user_file.read() == {origin(): {KEY: entry(CHOICE)}}
    assert user_file.clear()
    assert user_file.read() == {}


def test_times_survive_the_file_to_a_nanosecond():
    text = json.dumps({"schema": SCHEMA, "sections": [json.loads(SOUND)["sections"][0]]})
    ((_, entries),) = load_sections(text)[0].items()
    assert entries[KEY] == entry(CHOICE)
    assert entries[KEY].trials[1].dropped == "3 spills"
