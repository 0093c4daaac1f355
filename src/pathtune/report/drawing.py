"""Drawing: one style, and matplotlib figures as files or as SVG inside a page.

Colours are those of Okabe and Ito, which people with any colour vision can tell
apart. In a page they are CSS variables, so that a figure follows the colour scheme.
"""

from __future__ import annotations

import io
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pathtune import files

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = ("svg", "png", "pdf")

#: Name -> (colour on white, colour on the dark page).
PALETTE: Mapping[str, tuple[str, str]] = {
    "ink": ("#1b1f24", "#e6e8eb"),
    "muted": ("#5b6470", "#a3abb6"),
    "rule": ("#d9dde2", "#3a414b"),
    "blue": ("#0072b2", "#56b4e9"),
    "orange": ("#d55e00", "#f0904a"),
    "green": ("#00795b", "#3fc99c"),
    "purple": ("#a6548c", "#d79bc2"),
}
INK, MUTED, RULE, BLUE, ORANGE, GREEN, PURPLE = (c[0] for c in PALETTE.values())

# Matplotlib types its settings as a list of all names there are.
_STYLE: Any = {
    "font.size": 9,
    "font.family": "sans-serif",
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
    "figure.constrained_layout.use": True,
    "pdf.fonttype": 42,
    "text.parse_math": False,
}


@dataclass(frozen=True, eq=False)
class Points:
    """Values that can be read off a drawing.

    Parameters
    ----------
    axes
        Where they are drawn.
    x, y
        (n,) data coordinates.
    texts
        What each of them says.
    """

    axes: Axes
    x: Sequence[float] | np.ndarray
    y: Sequence[float] | np.ndarray
    texts: Sequence[str]


@dataclass(frozen=True, eq=False)
class Drawing:
    """A figure and what belongs to it.

    Parameters
    ----------
    title, caption
        For people; the caption says what was left out.
    figure
        The figure; see `canvas`.
    points
        What can be read off it.
    series
        What can be shown alone: the part before the dot of its artists' ``gid`` ->
        its name.
    """

    title: str
    caption: str
    figure: Figure
    points: Sequence[Points] = ()
    series: Mapping[str, str] = field(default_factory=dict)


# Matplotlib writes coordinates to the millionth of a 72nd of an inch.
_LONG = re.compile(r"(\d+\.\d{2})\d+")


@contextmanager
def style() -> Iterator[None]:
    """Draw in the style of the report; everything else is as before afterwards."""
    import matplotlib

    with warnings.catch_warnings(), matplotlib.rc_context(_STYLE):
        # Names in any script: a page has the reader's fonts.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        yield


def canvas(
    rows: int = 1, columns: int = 1, *, width: float = 7.0, height: float = 3.0
) -> tuple[Figure, list[Axes]]:
    """Return a figure (inches) and its axes, row by row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    axes = figure.subplots(rows, columns, squeeze=False)
    return figure, list(axes.ravel())


def logarithmic(axes: Axes) -> None:
    """Make the vertical axis logarithmic, with plain numbers; after plotting."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    subs = (1, 2, 5) if high > 20 * low else (1, 1.5, 2, 3, 4, 5, 7)
    axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))


def save(drawing: Drawing, path: Path) -> None:
    """Write a drawing to a file; the suffix decides its format.

    Equal drawings give equal files.
    """
    kind = path.suffix[1:]
    dates = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {}}
    content = io.BytesIO()
    with _hashed(path.stem):
        drawing.figure.savefig(
            content,
            format=kind,
            dpi=200,
            metadata={**dates[kind], "Creator" if kind != "png" else "Software": None},
        )
    files.write_bytes(path, content.getvalue())


@contextmanager
def _hashed(salt: str, **options: Any) -> Iterator[None]:
    import matplotlib

    settings: Any = {"svg.hashsalt": salt, **options}
    with matplotlib.rc_context(settings):
        yield


def inline_svg(drawing: Drawing, name: str) -> str:
    """Return a drawing as an ``<svg>`` element for a page of many.

    Its identifiers begin with `name`, its colours are the page's variables and its
    text is text, in the page's font.
    """
    content = io.StringIO()
    with _hashed(name, **{"svg.fonttype": "none"}):
        drawing.figure.savefig(
            content, format="svg", transparent=True, metadata={"Date": None}
        )
    svg = content.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r" ?font-family: [^;\"]*;", "", svg)
    svg = re.sub(r' transform="rotate\(-0 [^"]*"', "", svg)
    svg = _prefixed(svg, name)
    for colour, (light, _) in PALETTE.items():
        svg = svg.replace(light, f"var(--{colour})")
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = svg.replace("<svg", '<svg aria-hidden="true" focusable="false"', 1)
    # What the script moves to the value it reads out.
    ring = '<circle class="reading" r="5" visibility="hidden"/>'
    svg = svg[: svg.rindex("</svg>")] + f"{ring}</svg>"
    svg = _with_classes(svg, name)
    svg = re.sub(r"<[^>]*>", lambda tag: _LONG.sub(r"\1", tag.group()), svg)
    return re.sub(r"\n\s*", "\n", svg).strip()


def _prefixed(svg: str, name: str) -> str:
    """Begin identifiers with a name; drop those that nothing refers to."""
    wanted = set(re.findall(r'(?:href="|url\()#([^")]+)', svg))

    def renamed(match: re.Match[str]) -> str:
        identifier = match.group(1)
        is_series = "." in identifier and not identifier.startswith("matplotlib")
        return f' id="{name}-{identifier}"' if identifier in wanted or is_series else ""

    svg = re.sub(r' id="([^"]*)"', renamed, svg)
    return re.sub(r'href="#|url\(#', lambda match: f"{match.group()}{name}-", svg)


def _with_classes(svg: str, name: str) -> str:
    """Write styles that occur often once, as classes of a style sheet."""
    counts = Counter(re.findall(r' style="([^"]*)"', svg))
    often = [style for style, n in counts.items() if n > 2 and style]
    names = {style: f"{name}-{index}" for index, style in enumerate(often)}

    def short(match: re.Match[str]) -> str:
        known = names.get(match.group(1))
        return f' class="{known}"' if known else match.group()

    sheet = "".join(f".{known} {{ {style} }}\n" for style, known in names.items())
    svg = re.sub(r' style="([^"]*)"', short, svg)
    return re.sub(r"(<svg[^>]*>)", rf"\1\n<style>{sheet}</style>", svg, count=1)


def readings(drawing: Drawing) -> list[tuple[float, float, str]]:
    """Return the points of a drawing in the coordinates of its SVG, with their texts.

    The drawing must have been rendered.
    """
    figure = drawing.figure
    scale, height = 72 / figure.dpi, 72 * figure.get_figheight()
    found = []
    for points in drawing.points:
        places = points.axes.transData.transform(np.column_stack([points.x, points.y]))
        corners = np.asarray(points.axes.bbox.get_points())
        low, high = corners[0] - 1, corners[1] + 1
        is_inside = ((low <= places) & (places <= high)).all(axis=1)
        x, y = (places * scale).T.round(1)
        found += [
            (float(x[i]), float((height - y[i]).round(1)), points.texts[i])
            for i in np.flatnonzero(is_inside).tolist()
        ]
    return found
