"""Memory kept for a stream's launches: used again by later ones, by no two at a time."""

import pytest
import torch

from sk_triton.replay.workspace import MAX_SCRATCH, borrow, give_back, stream_of

CPU = torch.device("cpu")


@pytest.fixture
def stream():
    """One that no other test has."""
    return CPU, object()


def test_memory_that_was_given_back_is_borrowed_again(stream):
    first = borrow(100, stream)
    give_back(first, stream)
    assert borrow(10, stream) is first
    assert borrow(10, stream) is not first, "it was not given back"


def test_what_is_too_small_makes_room_for_larger_memory(stream):
    give_back(borrow(100, stream), stream)
    larger = borrow(3000, stream)
    assert larger.numel() >= 3000
    give_back(larger, stream)
    assert borrow(100, stream) is larger


def test_streams_share_nothing(stream):
    memory = borrow(100, stream)
    give_back(memory, stream)
    assert borrow(100, (CPU, object())) is not memory


def test_large_memory_is_not_kept(stream):
    memory = borrow(MAX_SCRATCH + 1, stream)
    give_back(memory, stream)
    assert borrow(MAX_SCRATCH + 1, stream) is not memory
    assert borrow(100, stream) is not memory
    kept = borrow(MAX_SCRATCH, stream)
    give_back(kept, stream)
    assert borrow(MAX_SCRATCH, stream) is kept


def test_memory_outlives_the_mode_that_it_was_asked_for_in(stream):
    with torch.inference_mode():
        assert not borrow(100, stream).is_inference()


def test_a_call_without_a_workspace(stream):
    give_back(borrow(0, stream), stream)


def test_a_cpu_has_one_stream():
    assert stream_of(CPU) == (CPU, 0)
