"""Charts as SVG text for the report and the tracking store. They take the colour of the text around them."""

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_SIZE = (4.4, 2.8)  # inches: readable on a phone, two side by side on a large screen
_INK = "#010203"  # a placeholder for the colour of the surrounding text
_COLOURS = ("#3b82f6", "#f59e0b", "#10b981", "#ef4444", "#8b5cf6", "#6b7280")
_MAX_POINTS = 200  # of one line

Line = tuple[Sequence[float], Sequence[float]]  # x and y
IntArray = npt.NDArray[np.int64]


def line_chart(
    x: str,
    y: str,
    series: Mapping[str, Line],
    *,
    diagonal: bool = False,
    log_x: bool = False,
    band: tuple[str, Line, Sequence[float]] | None = None,
) -> str:
    """One line for each of `series`, by its name; `x` and `y` label the axes. `diagonal` also draws x = y.

    `band` is an area behind the lines: its name, its lower edge, and the y of its upper edge.
    """

    def draw(axes: Axes) -> None:
        if band is not None:
            label, (xs, lowest), highest = band
            axes.fill_between(xs, lowest, highest, label=label, color=_COLOURS[-1], alpha=0.3, linewidth=0)
        for name, (xs, ys) in series.items():
            axes.plot(thinned(xs), thinned(ys), label=name, linewidth=1.2, marker="." if len(xs) < 40 else None)
        if diagonal:
            axes.axline((0, 0), slope=1, color=_INK, linewidth=0.6, linestyle=":")
        if log_x:
            axes.set_xscale("log")
        if len(series) > 1 or band is not None:
            axes.legend(frameon=False)

    return _svg(draw, x, y)


def error_bar_chart(
    x: str, y: str, labels: Sequence[str], series: Mapping[str, tuple[Sequence[str], Line]]
) -> str:
    """A point with an error bar for each label on the x axis, for each of `series`.

    A series has the labels of its points, their values and their standard errors.
    """

    def draw(axes: Axes) -> None:
        for i, (name, (own_labels, (values, errors))) in enumerate(series.items()):
            shift = 0.2 * (i - (len(series) - 1) / 2)  # beside each other
            places = [labels.index(label) + shift for label in own_labels]
            axes.errorbar(places, values, errors, label=name, fmt=".", elinewidth=1, capsize=2)
        axes.set_xticks(range(len(labels)), labels, rotation=45)
        axes.legend(frameon=False)

    return _svg(draw, x, y)


def bar_chart(x: str, values: Mapping[str, float]) -> str:
    """A horizontal bar for each name, with its value at the end; `x` labels the axis."""

    def draw(axes: Axes) -> None:
        container = axes.barh(list(values), list(values.values()), color=_COLOURS[0], height=0.6)
        axes.bar_label(container, fmt=" %.3g")
        axes.invert_yaxis()
        axes.margins(x=0.15)

    return _svg(draw, x, "")


def _svg(draw: Callable[[Axes], None], x: str, y: str) -> str:
    """The SVG of what `draw` draws.

    Equal input gives equal bytes. Text stays text; ids and metadata are removed.
    """
    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": x + y,
        "font.size": 8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "text.color": _INK,
        "axes.edgecolor": _INK,
        "axes.labelcolor": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
    }
    with rc_context(style), io.StringIO() as page:
        figure = Figure(_SIZE, layout="constrained")
        axes = figure.add_subplot()
        axes.set_prop_cycle(color=_COLOURS)
        draw(axes)
        axes.set(xlabel=x, ylabel=y)
        figure.savefig(page, format="svg", transparent=True, metadata={"Date": None})
        svg = page.getvalue()
    svg = re.sub(
        r' id="[a-z0-9_.]+_\d+"|<metadata>.*?</metadata>', "", svg[svg.index("<svg") :], flags=re.DOTALL
    )
    return svg.replace(_INK, "currentColor")


def thinned(values: Sequence[float]) -> Sequence[float]:
    """The values of a curve, reduced to 200 points or less: each is the mean of neighbouring values."""
    n = math.ceil(len(values) / _MAX_POINTS)
    return values if n <= 1 else [float(np.mean(values[i : i + n])) for i in range(0, len(values), n)]


def length_histogram(lengths: IntArray) -> tuple[IntArray, IntArray]:
    """Numbers of documents by length: the upper bounds of the classes, powers of 2, and the counts."""
    exponents, counts = np.unique(np.ceil(np.log2(np.maximum(lengths, 1))).astype(np.int64), return_counts=True)
    return 2**exponents, counts
