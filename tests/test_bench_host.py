"""What a call costs the host, and what starting up costs: how it is measured."""

import os
import subprocess

import sk_triton
from sk_triton.bench import results
from sk_triton.bench.measuring import host
from sk_triton.kernels.launch import Launch


def test_starting_up_is_timed_in_a_process_of_its_own():
    assert 20 < host._in_new_process("import time", "time.sleep(0.02)") < 10_000


def test_stubbed_launches_are_counted_and_put_back(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    ran = []
    launch = Launch(
        kernel={(1,): lambda **options: ran.append(1)}, grid=(1,), arguments=(), constexprs={}, options={}
    )
    with host.stubbed_launches(sk_triton) as started:
        compiled = launch()
        compiled[(2, 1, 1)](0, None)
        assert os.environ["TRITON_INTERPRET"] == "1"
    assert (started, ran) == ([(1,), (2, 1, 1)], [])
    assert "TRITON_INTERPRET" not in os.environ
    launch()
    assert ran == [1]


def test_a_failing_start_is_recorded(monkeypatch):
    def fail(before, timed):
        raise subprocess.CalledProcessError(1, "python", stderr="Traceback\nImportError: no torch\n")

    monkeypatch.setattr(host, "_in_new_process", fail)
    records = list(host._start_up_records(on_gpu=True))
    assert {record.case.subject for record in records} == {
        host.IMPORT_TORCH,
        host.IMPORT_OURS,
        host.FIRST_CALL,
    }
    assert {(record.status, record.message) for record in records} == {
        (results.FAILED, "ImportError: no torch")
    }
