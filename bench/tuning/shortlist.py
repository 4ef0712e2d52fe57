"""Which configs of a search space are tried: the most promising, within a limit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import zip_longest
from typing import Any

_TILE_FIELDS = ("BLOCK_N", "BLOCK_H", "BLOCK_W", "RUN_H", "DATA_RUN_H")


def shortlist(
    configs: Sequence[Any], analytic_choice: Any, cost: Callable[[Any], float] | None, limit: int
) -> list[Any]:
    """The analytic choice and at most `limit - 1` others, the most promising first.

    With a cost model, the cheapest tiles of each formulation in turn, since the model compares tiles, not formulations;
    without one, those closest to the analytic choice.
    """
    others = [config for config in configs if config != analytic_choice]
    if cost is None:
        ranked: Iterable[Any] = sorted(others, key=lambda config: _distance(config, analytic_choice))
    else:
        families: dict[Any, list[Any]] = {_family(analytic_choice): []}
        for config in sorted(others, key=cost):
            families.setdefault(_family(config), []).append(config)
        in_turn = _in_turn(_dense_and_sparse(families.values()))
        ranked = [config for _, _, config in sorted(in_turn, key=lambda item: item[:2])]
    return [analytic_choice, *ranked][:limit]


def _dense_and_sparse(families: Iterable[list[Any]]) -> list[list[Any]]:
    """Families of configs, those of sparse products and the others by turns: a model of products alone would try no
    others."""
    by_kind: tuple[list[list[Any]], list[list[Any]]] = ([], [])
    for family in families:
        by_kind[any(getattr(config, "SPARSE", False) for config in family)].append(family)
    return [family for pair in zip_longest(*by_kind) for family in pair if family is not None]


def _in_turn(families: list[list[Any]]) -> Iterable[tuple[int, int, Any]]:
    for index, family in enumerate(families):
        for rank, config in enumerate(family):
            yield rank, index, config


def _family(config: Any) -> Any:
    """A config without its tile."""
    return type(config), tuple((name, v) for name, v in vars(config).items() if name not in _TILE_FIELDS)


def _distance(config: Any, other: Any) -> float:
    """Doublings and switches that lead from one config to another, in what both have."""
    sizes, others = vars(config), vars(other)
    shared = [(size, others[name]) for name, size in sizes.items() if name in others]
    return sum(size != own if isinstance(size, bool) else abs(math.log2(size / own)) for size, own in shared)
