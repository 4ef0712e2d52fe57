"""Settings shared by all tests."""

import gc
import importlib.util
import math
import os
import tempfile
from collections import Counter

import pytest
import torch
from hypothesis import register_random, settings

from .interpreter import checked_overflow, quicken

# What this machine's user tuned is none of the tests' business.
os.environ["SK_TRITON_CACHE_DIR"] = os.path.join(tempfile.gettempdir(), "sk-triton-tests-tuned-nothing")

# No deadline: two busy cores time nothing. Derandomised: a failure on one machine is a failure on all.
settings.register_profile("sk_triton", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("sk_triton")


class TorchRandom:
    """PyTorch's random numbers, for hypothesis: of an example alone, not of those before it."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


torch_random = TorchRandom()  # hypothesis keeps no reference
register_random(torch_random)

# The tensors are tiny: a second thread only waits.
torch.set_num_threads(1)


def pytest_xdist_auto_num_workers():
    """One process where there is a GPU to share."""
    return 1 if torch.cuda.is_available() else os.cpu_count()


def pytest_addoption(parser):
    parser.addoption(
        "--emulate",
        metavar="CHIP",
        default=None,
        choices=("sm_80", "sm_86", "sm_89", "sm_90", "sm_120"),
        help="run what is marked interpret by the compiled code for a chip, emulated, not by Triton's interpreter",
    )


def pytest_configure(config):
    # Triton reads the switch when a kernel is defined: in one process kernels are either interpreted or compiled.
    if emulated_chip(config):
        os.environ["TRITON_INTERPRET"] = "0"
    elif not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    if is_interpreted() and importlib.util.find_spec("triton"):
        quicken()
    # Else xdist begins with the files of most tests; those of a few that compile for minutes would come last.
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def emulated_chip(config):
    """Of --emulate, None without."""
    return config.getoption("--emulate", None)


def is_interpreted():
    return os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(config, items):
    compiling = {item.path for item in items if "compile" in item.keywords}
    items.sort(key=lambda item: item.path not in compiling)
    for item in items:
        if "gpu" in item.keywords and (is_interpreted() or not torch.cuda.is_available()):
            item.add_marker(pytest.mark.skip(reason="needs a GPU and compiled kernels"))
        if "interpret" in item.keywords and not (is_interpreted() or emulated_chip(config)):
            item.add_marker(
                pytest.mark.skip(reason="kernels are compiled here: TRITON_INTERPRET=1 pytest -m interpret")
            )
        if emulated_chip(config):
            if "interpret" not in item.keywords:
                item.add_marker(pytest.mark.skip(reason="runs no kernel on the CPU"))
            if "interpreter_only" in item.keywords or "started_directly" in item.fixturenames:
                item.add_marker(pytest.mark.skip(reason="looks into the interpreter"))


def pytest_collection_finish():
    """What is imported and collected stays: searching it for garbage again and again took up to a fifth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


@pytest.fixture(autouse=True, scope="session")
def _emulated(pytestconfig):
    """With --emulate."""
    chip = emulated_chip(pytestconfig)
    if chip:
        from .emulator.session import emulating

        with emulating(chip):
            yield
    else:
        yield


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(params=[torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
def memory_format(request):
    return request.param


@pytest.fixture
def without_tf32(monkeypatch):
    """Convolutions in fp32 are IEEE's."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder for tuned configs, empty and of this test alone; it does not exist yet."""
    from sk_triton.tuning import user_file

    def start_anew():
        user_file.forget()
        user_file.changed()

    monkeypatch.setenv(user_file.FOLDER_VARIABLE, str(tmp_path / "tuned"))
    start_anew()
    yield tmp_path / "tuned"
    start_anew()


@pytest.fixture
def overflow_is_an_error():
    """In the interpreter, of 32-bit integers."""
    with checked_overflow():
        yield


@pytest.fixture
def nan_in_new_memory(monkeypatch):
    """Outputs and scratch memory start as NaN: what is read before it is written shows."""
    empty, new_empty = torch.empty, torch.Tensor.new_empty

    def poison(tensor):
        return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: poison(empty(*args, **kwargs)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **kwargs: poison(new_empty(*args, **kwargs)))


@pytest.fixture
def fake_code(monkeypatch):
    """Every kernel compiles to the same few instructions a thread, or a pixel of its run."""
    from sk_triton.bench.model import speed_of_light as sol

    from .fake_code import resources

    code = {"LDG.E.128": 16, "STG.E.128": 8, "HMMA.16816.F32": 32, "IMAD": 400}

    def compiled(launch, chip):
        # A window's runs are of any length, and its code with them.
        size = launch.constexprs["RUN_H"] * launch.constexprs["RUN_W"] if "BLOCKS" in launch.constexprs else 1
        own = {name: count * size for name, count in code.items()}
        return resources(own, threads=(64 if chip.startswith("gfx") else 32) * launch.options["num_warps"])

    monkeypatch.setattr(sol, "compiled", compiled)
    monkeypatch.setattr(sol.dispatch, "is_interpreted", lambda: False)


@pytest.fixture
def started_directly(monkeypatch):
    """The kernels that recorded calls start directly, by the interpreter all the same."""
    from sk_triton.kernels.launch import Launch

    from .directly import Compiled

    found = []
    jit = Launch.__call__

    def start(launch):
        jit(launch)
        return Compiled(launch, found)

    monkeypatch.setattr(Launch, "__call__", start)
    return found


@pytest.fixture
def started(monkeypatch):
    """How many launches each planned pass of a training step took."""
    from sk_triton.training.tape import Tape

    counts = Counter()
    run = Tape.run

    def counted(tape, launch):
        counts[id(tape)] += 1
        run(tape, launch)

    monkeypatch.setattr(Tape, "run", counted)
    return counts
