"""sk_triton's speed against the fastest peer, as the label of a case."""

from __future__ import annotations

from matplotlib.axes import Axes

from ..formats import ratio
from ..verdict import Comparison
from . import style


def label_speed(
    ax: Axes, comparison: Comparison | None, x: float, y: float, points: float, size: float = style.TICK
) -> None:
    """Writes the speed at `x` (data) and `y` (share of the panel's height), `points` away: blue a gain, red a loss.

    A difference within the noise is called that; a speed that sk_triton alone reached in a CUDA graph has an asterisk.
    """
    if comparison is None or comparison.speedup is None:
        return
    if comparison.is_beyond_noise:
        text, tone = (
            ratio(comparison.speedup) + "*" * comparison.is_ours_alone_in_graph,
            style.ALARM if comparison.is_loss else style.colour("ours"),
        )
    else:
        text, tone = "± noise", style.MUTED
    ax.annotate(
        text,
        (x, y),
        (0, points),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        ha="center",
        va="top",
        fontsize=size if comparison.is_beyond_noise else style.NUMBER,
        weight="bold" if comparison.is_beyond_noise else "normal",
        color=tone,
        path_effects=style.HALO,
        annotation_clip=False,
        zorder=6,
    )
