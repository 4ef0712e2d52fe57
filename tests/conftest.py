"""Settings shared by all tests."""

import pytest
import torch
from hypothesis import settings

# No deadline: two busy cores time nothing. Derandomised: a failure on one machine is a failure on all.
settings.register_profile("sk_triton", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("sk_triton")


# The tensors are tiny: a second thread only waits.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(params=[torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
def memory_format(request):
    return request.param
