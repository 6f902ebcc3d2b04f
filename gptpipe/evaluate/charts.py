"""Charts as SVG text for the report and the tracking store, in the colour of the text around them."""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_SIZE = (4.4, 2.8)  # inches: readable on a phone, two beside each other on a desk
_INK = "#010203"  # stands for the colour of the text, until the page says what that is
_COLOURS = ("#3b82f6", "#f59e0b", "#10b981", "#ef4444", "#8b5cf6", "#6b7280")
_POINTS = 200  # of one line; of a longer one, means of neighbours

Line = tuple[Sequence[float], Sequence[float]]  # x and y


def lines(x: str, y: str, series: Mapping[str, Line], *, diagonal: bool = False, log_x: bool = False) -> str:
    """One line for each of `series`; `diagonal` also draws x = y."""

    def draw(axes: Axes) -> None:
        for name, (xs, ys) in series.items():
            axes.plot(_thin(xs), _thin(ys), label=name, linewidth=1.2, marker="." if len(xs) < 40 else None)
        if diagonal:
            axes.axline((0, 0), slope=1, color=_INK, linewidth=0.6, linestyle=":")
        if log_x:
            axes.set_xscale("log")
        if len(series) > 1:
            axes.legend(frameon=False)

    return _svg(draw, x, y)


def bars(x: str, values: Mapping[str, float]) -> str:
    """A bar for each name, its value at the end."""

    def draw(axes: Axes) -> None:
        container = axes.barh(list(values), list(values.values()), color=_COLOURS[0], height=0.6)
        axes.bar_label(container, fmt=" %.3g")
        axes.invert_yaxis()
        axes.margins(x=0.15)

    return _svg(draw, x, "")


def _svg(draw: Callable[[Axes], None], x: str, y: str) -> str:
    """Equal input gives equal bytes. Text stays text; ids that only matplotlib needs go."""
    style: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": x + y, "font.size": 8, "axes.spines.top": False,
             "axes.spines.right": False, **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor",
             "xtick.color", "ytick.color"), _INK)}  # fmt: skip
    with rc_context(style), io.StringIO() as page:
        figure = Figure(_SIZE, layout="constrained")
        axes = figure.add_subplot()
        axes.set_prop_cycle(color=_COLOURS)
        draw(axes)
        axes.set(xlabel=x, ylabel=y)
        figure.savefig(page, format="svg", transparent=True, metadata={"Date": None})
        svg = page.getvalue()
    svg = re.sub(r' id="[a-z0-9_.]+_\d+"|<metadata>.*?</metadata>', "", svg[svg.index("<svg") :], flags=re.DOTALL)
    return svg.replace(_INK, "currentColor")


def _thin(values: Sequence[float]) -> Sequence[float]:
    n = -(-len(values) // _POINTS)
    return values if n <= 1 else [float(np.mean(values[i : i + n])) for i in range(0, len(values), n)]
