"""What of a call can be recorded where the library computes a part of it, and what a recording gives."""

import gc

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from sk_triton.library import LibraryCall
from sk_triton.replay.places import SideBySide
from sk_triton.replay.recording import record


def product(x, weight):
    return [x * weight]


def recorded(calls, tensors, fixed, outputs):
    """A recording of library calls that have run."""
    started = [call() for call in calls]
    made = [tensor for own in started for tensor in own]
    return record(calls, started, (*tensors, *made), fixed, outputs=outputs + len(made))


def test_the_library_reads_the_tensors_of_each_call():
    x, weight = torch.ones(2, 3), torch.full((2, 3), 2.0)
    recording = recorded([LibraryCall(product, (x, weight))], [x], [torch.ones(1), weight], 0)
    assert recording.given == (True,)
    assert recording.reads == (1,)
    for factor in (3.0, 4.0):
        (found,) = recording.start(torch.full((2, 3), 5.0), torch.empty(0), torch.full((2, 3), factor))
        assert torch.equal(found, torch.full((2, 3), 5 * factor))


def test_parts_of_memory_are_read_and_written_where_they_lie():
    x, y, between = torch.arange(8.0), torch.zeros(4, 2), torch.zeros(3, 2)

    def copy(source, target):
        target.copy_(source)
        return ()

    calls = [
        LibraryCall(copy, (x[2:8].view(2, 3).t(), between)),
        LibraryCall(copy, (between[1:], y[2:])),
    ]
    packing = SideBySide([y])
    recording = recorded(calls, [x, packing], [], 1)
    assert recording.given == (False,)
    inner, memory = torch.arange(9.0)[1:] + 1, torch.zeros(packing.nbytes, dtype=torch.uint8)
    assert recording.start(inner, memory, torch.empty(recording.workspace_bytes, dtype=torch.uint8)) == []
    written = memory[: y.nbytes].view(torch.float32).view(4, 2)
    assert torch.equal(written, torch.tensor([[0, 0], [0, 0], [5, 8], [6, 9]]) + 0.0)


def test_absent_tensors_stay_absent():
    x = torch.ones(2)

    def product_or_not(x, bias):
        assert bias is None
        return [x * 2]

    recording = recorded([LibraryCall(product_or_not, (x, None))], [x], [], 0)
    assert torch.equal(recording.start(x + 1, torch.empty(0))[0], x * 4)


def test_neither_gradients_nor_autocast_reach_the_library():
    x, weight = torch.ones(2, 2), torch.ones(2, 2)
    recording = recorded([LibraryCall(lambda x, weight: [x @ weight], (x, weight))], [x], [weight], 0)
    with torch.autocast("cpu", torch.bfloat16):
        (found,) = recording.start(x.clone().requires_grad_(), torch.empty(0), weight)
    assert found.dtype == torch.float32
    assert not found.requires_grad


def test_a_recording_keeps_no_tensor_of_its_call():
    x, weight = torch.ones(2), torch.ones(2)
    recording = recorded([LibraryCall(product, (x, weight))], [x], [weight], 0)
    storages = [StorageWeakRef(tensor.untyped_storage()) for tensor in (x, weight)]
    del x, weight
    gc.collect()
    assert all(storage.expired() for storage in storages)
    assert recording.starts


def part_of_a_parameter(x, weight):
    return [LibraryCall(product, (x, weight[:2]))], [x]


def result_in_the_input(x, weight):
    return [LibraryCall(lambda x: [x.mul_(2)[:]], (x,))], [x]


@pytest.mark.parametrize("make", [part_of_a_parameter, result_in_the_input])
def test_what_has_no_place_is_not_recorded(make):
    x, weight = torch.ones(2), torch.ones(3)
    calls, tensors = make(x, weight)
    assert recorded(calls, tensors, [weight], 0) is None


def test_results_must_be_outputs_in_their_order():
    x, weight = torch.ones(2), torch.ones(2)
    call = LibraryCall(lambda x, weight: [x * weight, x + weight], (x, weight))
    one, other = found = call()
    assert record([call], [found], (x, one, other), [weight], outputs=2) is not None
    assert record([call], [found], (x, other, one), [weight], outputs=2) is None
    assert record([call], [found], (x, one), [weight], outputs=1) is None


def test_a_result_that_a_later_step_reads_is_not_recorded():
    x, weight = torch.ones(2), torch.ones(2)
    first = LibraryCall(product, (x, weight))
    (made,) = found = first()
    second = LibraryCall(product, (made, weight))
    (last,) = second()
    assert record([first, second], [found, [last]], (x, made, last), [weight], outputs=2) is None
