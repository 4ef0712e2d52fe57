"""Correctness before time: a provider's tensors against float64.

Error rule: the error is at most twice that of plain eager PyTorch in the same dtype on the same input. Eager's error is
the larger of its two memory formats', whose sums run in different orders. The output of a unit is judged by its largest
error, gradients and whole networks by the root mean square.

Roundings take single values across the threshold of a ReLU, which switches their whole gradient on or off: by chance,
and elsewhere in each implementation. So the gradients of units with a ReLU are allowed at least what that does
(`flip_share`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .. import results
from ..shapes import CLASSIC, INFERENCE, STAGES, TRAINING, Case
from . import forms
from .entrant import Entrant, Outcome
from .forms import Form
from .providers import Provider
from .sources import yardstick

LARGEST = "largest"
RMS = "root mean square"
ERROR_FACTOR = 2.0
FLIPS = 4
CHUNK = 8
"""Samples compared in float64 at a time, which bounds the memory that a check takes."""


class Judge:
    """The float64 result of a case on one input, and the error that each of its tensors is allowed.

    Raises:
        OverflowError: eager PyTorch's own result is not finite, so that no error can be allowed.
    """

    def __init__(
        self,
        case: Case,
        state: dict[str, Tensor],
        kind: str,
        x: Tensor,
        dv: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        self.kind, self.dtype, self.samples = kind, dtype, x.shape[0]
        self.reference = _oracle(case, state, x, dv)
        self.norms = {
            name: LARGEST if name == "v" and not case.is_network else RMS for name in self.reference
        }
        gradient_share = flip_share(case, x.shape[0], dtype) if case.direction == TRAINING else 0.0
        self.shares = {name: 0.0 if name == "v" else gradient_share for name in self.reference}
        self.eager_error = dict.fromkeys(self.reference, 0.0)
        for form in forms.EAGER:
            for name, tensor in _eager(case, state, x, dv, form).items():
                error = absolute_error(tensor, self.reference[name], self.norms[name])
                if not math.isfinite(error):
                    raise OverflowError(
                        f"eager PyTorch's {name} on {kind} input is not finite in {dtype}: no error can be allowed"
                    )
                self.eager_error[name] = max(self.eager_error[name], error)

    def check(self, outcome: Outcome) -> list[results.Check]:
        """One check for each of "v", "dx" and "parameters" that the case has: of the last the worst."""
        by_tensor: dict[str, list[results.Check]] = {}
        for name, reference in self.reference.items():
            tensor, norm = outcome.get(name), self.norms[name]
            error = float("inf") if tensor is None else absolute_error(tensor, reference, norm)
            label = name.partition(".")[0]
            allowed = allowed_error(self.eager_error[name], reference, self.dtype, norm, self.shares[name])
            judged = check(self.kind, label, error, self.eager_error[name], allowed, norm, self.samples)
            by_tensor.setdefault(label, []).append(judged)
        return [max(checks, key=_excess) for checks in by_tensor.values()]


def check(
    kind: str,
    tensor: str,
    error: float,
    eager_error: float,
    allowed: float,
    norm: str = LARGEST,
    samples: int | None = None,
) -> results.Check:
    """The verdict on one tensor's error on the input named `kind`, of which `samples` were checked."""
    finite = error if math.isfinite(error) else None
    passed = finite is not None and finite <= allowed
    return results.Check(kind, tensor, finite, eager_error, allowed, passed, norm, samples)


def absolute_error(y: Tensor, reference: Tensor, norm: str = LARGEST) -> float:
    """Size of the difference, in float64; infinite if shapes differ or a value is not finite."""
    if y.shape != reference.shape:
        return float("inf")
    chunks = zip(y.split(CHUNK), reference.split(CHUNK), strict=True)
    differences = (got.double() - expected for got, expected in chunks)
    if norm == LARGEST:
        size = torch.stack([difference.abs().max() for difference in differences]).max().item()
    else:
        squares = torch.stack([difference.square().sum() for difference in differences]).sum().item()
        size = (squares / max(reference.numel(), 1)) ** 0.5
    return size if math.isfinite(size) else float("inf")


def allowed_error(
    eager_error: float, reference: Tensor, dtype: torch.dtype, norm: str = LARGEST, share: float = 0.0
) -> float:
    """Twice eager's own error; at least one rounding step of the reference's size, should eager be exact, or `share` of
    it."""
    return max(ERROR_FACTOR * eager_error, max(torch.finfo(dtype).eps, share) * _size(reference, norm))


def flip_share(case: Case, batch: int, dtype: torch.dtype) -> float:
    """`flips` of a case's values; 0 without a ReLU."""
    if case.subject == CLASSIC:
        return 0.0
    shape = case.shape
    values = batch * shape.channels * shape.height * shape.width
    if case.is_network:  # the last stage has the fewest: of 32 x 32 pixels it leaves one
        values = batch * STAGES[4][0] * math.ceil(shape.height / 32) * math.ceil(shape.width / 32)
    return flips(values, dtype)


def flips(values: int, dtype: torch.dtype) -> float:
    """What values that roundings take across a ReLU's threshold may change in a gradient, as a share of its size.

    Of n values about n * eps flip, and now and then one where that is less; each changes as much as it is worth. Four
    flips and twice eps are from trials with independently rounded units.
    """
    return (FLIPS**2 / values + 2 * torch.finfo(dtype).eps) ** 0.5


def _size(values: Tensor, norm: str) -> float:
    size = values.abs().max() if norm == LARGEST else values.square().mean().sqrt()
    return size.item()


def _excess(judged: results.Check) -> float:
    if judged.error is None:
        return float("inf")
    return judged.error / judged.allowed if judged.allowed else judged.error


def _oracle(case: Case, state: dict[str, Tensor], x: Tensor, dv: Tensor | None) -> Outcome:
    """In float64, by PyTorch's own convolutions: the library that most providers share is not its own judge."""
    module = _yardstick(case, state, x.device).double()
    with _without_cudnn():
        if case.direction == INFERENCE:
            with torch.no_grad():
                return {"v": torch.cat([module.eval()(part.double()) for part in x.split(CHUNK)])}
        assert dv is not None
        entrant = Entrant(case, Provider(yardstick(case.subject), forms.NCHW), module)
        call, read = entrant.bind(x.double(), dv.double())
        return read(call())


@contextmanager
def _without_cudnn() -> Iterator[None]:
    before = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = before


def _eager(case: Case, state: dict[str, Tensor], x: Tensor, dv: Tensor | None, form: Form) -> Outcome:
    module = _yardstick(case, state, x.device)
    module.to(dtype=x.dtype, memory_format=form.memory_format)  # type: ignore[call-overload]
    entrant = Entrant(case, Provider(yardstick(case.subject), form), module)
    with form.scope():  # as everyone else runs: see `forms`
        call, read = entrant.bind(x, dv)
        return read(call())


def _yardstick(case: Case, state: dict[str, Tensor], device: torch.device) -> nn.Module:
    module = yardstick(case.subject).module(case)
    module.load_state_dict(state)
    return module.to(device)
