"""Which tensors the forward pass saves for the backward pass: a choice scoped to a block of code."""

from __future__ import annotations

from functools import partial
from typing import Literal, get_args

from .scoped import Scope, Scoped

Save = Literal["branches", "input"]
SAVES: tuple[Save, ...] = get_args(Save)

_save: Scoped[Save | None] = Scoped("save", None)


def save_for_backward(save: Save) -> Scope:
    """Choose what units in training save, in a ``with`` block, or in a function when used as a decorator.

    It goes before a layer's own choice (its attribute ``save``) and holds for the forward pass: the backward pass may
    run outside of the block. ``torch.utils.checkpoint`` runs a forward pass again then, so the block stands inside of
    the function that is checkpointed, or the layer has the choice; the block stands around a compiled function.

    Args:
        save: "branches" saves the branches' convolutions, the input and small tensors; "input" the input and small
            tensors alone, and convolves again in the backward pass. In 16 bits and groups of up to 16 channels the
            forward pass then writes no branch either: it convolves three times, in 4 passes over memory instead of 8,
            and results differ from those of "branches" by rounding, as those of inference do. On a CPU it has
            no effect.

    Raises:
        ValueError: an unknown name.
    """
    return Scope("save_for_backward", partial(_save.scope, check_save(save)))


def check_save(save: Save) -> Save:
    """`save` itself.

    Raises:
        ValueError: an unknown name.
    """
    if save not in SAVES:
        raise ValueError(f"save must be one of {', '.join(map(repr, SAVES))}, got {save!r}")
    return save


def chosen_save(own: Save | None) -> Save:
    """What holds for a layer with a choice of its `own`, or None.

    Raises:
        ValueError: an unknown name.
    """
    return _save.get() or ("branches" if own is None else check_save(own))
