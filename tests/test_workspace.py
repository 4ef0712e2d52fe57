"""Memory kept for a stream's launches is shared by no two that may overlap."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from sk_triton.workspace import MAX_SCRATCH, scratch, stream_of

CPU = torch.device("cpu")


@pytest.fixture
def stream():
    """One that no other test has."""
    return CPU, object()


def test_scratch_is_kept_for_the_next_call_and_grows(stream):
    first = scratch(100, stream)
    assert scratch(100, stream) is scratch(10, stream) is first
    larger = scratch(200, stream)
    assert larger.numel() >= 200
    assert scratch(100, stream) is larger


def test_another_thread_and_another_stream_have_scratch_of_their_own(stream):
    kept = [scratch(100, stream), scratch(100, (CPU, object()))]
    with ThreadPoolExecutor(1) as executor:
        kept.append(executor.submit(scratch, 100, stream).result())
    assert len({memory.data_ptr() for memory in kept}) == 3


def test_large_scratch_is_not_kept(stream):
    assert scratch(MAX_SCRATCH + 1, stream) is not scratch(MAX_SCRATCH + 1, stream)
    kept = scratch(MAX_SCRATCH, stream)
    assert scratch(MAX_SCRATCH, stream) is kept


def test_scratch_outlives_the_mode_that_it_was_asked_for_in(stream):
    with torch.inference_mode():
        assert not scratch(100, stream).is_inference()


def test_a_cpu_has_one_stream():
    assert stream_of(CPU) == (CPU, 0)
