"""The scope of ``use_backend``."""

import asyncio
import threading

import pytest
import torch

from sk_triton import SKConv, save_for_backward, use_backend
from sk_triton.backend import BACKENDS, current_backend


def test_default_is_auto():
    assert current_backend() == "auto"


@pytest.mark.parametrize("name", BACKENDS)
def test_scope(name):
    with use_backend(name):
        assert current_backend() == name
    assert current_backend() == "auto"


def test_nested_scopes_and_errors_restore():
    with use_backend("triton"):
        with pytest.raises(KeyError), use_backend("reference"):
            raise KeyError
        assert current_backend() == "triton"
    assert current_backend() == "auto"


def test_decorator_serves_many_calls_and_recursion():
    @use_backend("reference")
    def depth(n):
        assert current_backend() == "reference"
        return n and 1 + depth(n - 1)

    assert [depth(3), depth(0)] == [3, 0]
    assert current_backend() == "auto"


def test_a_scope_may_be_entered_again_and_within_itself():
    scope = use_backend("reference")
    for _ in range(2):
        with scope, use_backend("triton"), scope:
            assert current_backend() == "reference"
        assert current_backend() == "auto"


def test_functions_that_run_after_the_call_are_not_decorated():
    def numbers():
        yield 1

    async def task(): ...

    async def stream():
        yield 1

    for choice in (use_backend("reference"), save_for_backward("input")):
        for later in (numbers, task, stream):
            with pytest.raises(
                TypeError, match=f"cannot decorate .*{later.__name__}, a coroutine or generator"
            ):
                choice(later)


def test_threads_do_not_see_each_other():
    seen = []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(current_backend()))
        thread.start()
        thread.join()
    assert seen == ["auto"]


def test_overlapping_threads_leave_nothing_behind():
    """A scope that outlives the one it was opened in; what Dynamo reads must be "auto" again after both."""
    from sk_triton import backend

    opened, closed = threading.Event(), threading.Event()

    def other():
        with use_backend("reference"):
            opened.set()
            closed.wait()

    with use_backend("triton"):
        thread = threading.Thread(target=other)
        thread.start()
        opened.wait()
    closed.set()
    thread.join()
    assert backend._backend._latest == "auto"


def test_tasks_do_not_see_each_other():
    async def task(name, other_runs):
        with use_backend(name):
            await asyncio.sleep(other_runs)
            return current_backend()

    async def both():
        return await asyncio.gather(task("triton", 0.02), task("reference", 0.01))

    assert asyncio.run(both()) == ["triton", "reference"]


@pytest.mark.parametrize("name", ["cuda", "", None, "Triton"])
def test_unknown_name(name):
    allowed = "'auto', 'triton', 'reference', 'torch'"
    with pytest.raises(ValueError, match=f"backend must be one of {allowed}, got {name!r}"):
        use_backend(name)


def test_compiled_code_follows_the_backend():
    """One graph without breaks; another backend is another graph, so nothing stale runs."""
    torch.compiler.reset()

    @torch.compile(backend="eager", fullgraph=True)
    def code(x):
        return x + BACKENDS.index(current_backend())

    x = torch.zeros(())
    assert code(x) == 0
    with use_backend("reference"):
        assert code(x) == 2
    assert code(x) == 0


def test_a_layer_compiles_to_one_graph():
    torch.compiler.reset()
    layer = SKConv(8, 2, 2, 2, L=4)
    x = torch.randn(2, 8, 5, 6)
    with use_backend("reference"):
        torch.testing.assert_close(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))
