"""Plots of the page: matplotlib figures, and each as SVG that stands inside an HTML page.

Text stays text, colours become variables of the page's style sheet, and whatever would clash with
another figure or with the page (ids, a style sheet, metadata) is taken out. The same figure always
gives the same bytes.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from compress.runs.plots import BLUE, FAINT, GREEN, INK, ORANGE, PALE, VERMILION
from compress.terminal.text import plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 4.2
"""Of every figure, in inches, as heights are: a column of a phone, where text stays readable."""
MOST_LETTERS = 30
"""Of a name in a figure."""
GRID, PAPER = "#DDDDDD", "#FFFFFF"

VARIABLES = {
    INK: "ink",
    FAINT: "faint",
    PALE: "pale",
    GRID: "grid",
    BLUE: "blue",
    ORANGE: "orange",
    GREEN: "green",
    VERMILION: "vermilion",
    PAPER: "card",
}
"""Colours that a figure may use, and the variables of the page that they become."""

_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "compress",  # ids are digests of it, not of the clock
    "font.size": 9,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "axes.labelsize": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.edgecolor": FAINT,
    "figure.facecolor": "none",
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.titlecolor"), INK),
    **dict.fromkeys(("xtick.labelcolor", "ytick.labelcolor", "xtick.color", "ytick.color"), INK),
}

_SHAPES = {"path", "use", "text", "tspan", "image"}
_REFERENCE = re.compile(r"#([\w.-]+)")
_LONG = re.compile(r"-?\d+\.\d{3,}")
_COLOUR = re.compile(r"#[0-9a-fA-F]{6}\b")
_SPACES = re.compile(r"\s+")


@dataclass(frozen=True)
class Plot:
    """One or more figures under one title."""

    key: str
    """Names it within the page."""
    title: str
    caption: str
    """How to read it."""
    figures: tuple[Figure, ...]
    notes: tuple[str, ...] = ()
    """Sentences on what the figures show."""


@contextmanager
def default_style() -> Iterator[None]:
    """Draw in the style of the page, whatever the user's matplotlibrc says."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        parameters: Any = matplotlib.rcParams  # typed key by key
        parameters.update(_STYLE)
        yield


def stacked_panels(count: int, height: float) -> tuple[Figure, list[Axes]]:
    """Return a figure with axes one below the other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 0.25 + height * count), layout="constrained")
    return figure, list(figure.subplots(count, squeeze=False)[:, 0])


def inline_svg(figure: Figure, key: str, label: str) -> str:
    """Return a figure as an ``svg`` element without size, so that it fills what it stands in.

    Args:
        figure: drawn with the colours of ``VARIABLES`` only, inside ``default_style``.
        key: begins every id, so it must differ from that of every other figure of the page.
        label: says what the figure shows to those who do not see it.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    FigureCanvasSVG(figure)
    buffer = io.StringIO()
    with warnings.catch_warnings():
        # The browser has fonts for what matplotlib's own lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    root = ElementTree.fromstring(buffer.getvalue())
    drawn = _element(root, "svg", {"viewBox": root.attrib["viewBox"], "role": "img"})
    drawn.set("aria-label", plain(label))
    used = {
        name for element in root.iter() for value in element.attrib.values() for name in _ids(value)
    }
    drawn.extend([*_children(root, lambda name: f"{key}-{name}" if name in used else None)])
    return ElementTree.tostring(drawn, encoding="unicode", short_empty_elements=True)


def fitted(name: str, most: int = MOST_LETTERS) -> str:
    """Return a name that fits into a figure; its end tells more than its beginning."""
    name = plain(name)
    return name if len(name) <= most else f"\N{HORIZONTAL ELLIPSIS}{name[1 - most :]}"


def _children(
    parent: ElementTree.Element, name: Callable[[str], str | None]
) -> Iterator[ElementTree.Element]:
    """Yield what a figure needs of the elements below one; groups that only name are opened up."""
    for child in parent:
        tag = child.tag.rpartition("}")[2]
        if tag in {"metadata", "style"}:
            continue
        attributes = dict(_attributes(child, name))
        below = list(_children(child, name))
        if tag == "g" and not attributes:
            yield from below
        elif below or tag in _SHAPES:
            found = _element(child, tag, attributes)
            found.extend(below)
            yield found
        elif tag == "rect":
            yield _element(child, tag, attributes)


def _attributes(
    element: ElementTree.Element, name: Callable[[str], str | None]
) -> Iterator[tuple[str, str]]:
    for key, value in element.attrib.items():
        key = key.rpartition("}")[2]
        if key == "id":
            renamed = name(value)
            if renamed is not None:
                yield key, renamed
        elif key == "style":
            yield key, _style(value)
        elif key in {"href", "clip-path"}:
            yield key, _REFERENCE.sub(lambda found: f"#{name(found[1])}", value)
        elif not (key == "transform" and value.startswith("rotate(-0 ")):
            yield key, _SPACES.sub(" ", _LONG.sub(_short, value)).strip()


def _style(text: str) -> str:
    """Return a style with variables for colours, and without the font, which the page chooses."""
    kept = (rule for rule in text.split("; ") if not rule.startswith("font-family"))
    return _COLOUR.sub(lambda found: f"var(--{_by_hex()[found[0].upper()]})", ";".join(kept))


def _by_hex() -> dict[str, str]:
    return {colour.upper(): name for colour, name in VARIABLES.items()}


def _short(number: re.Match[str]) -> str:
    return f"{float(number[0]):.2f}".rstrip("0").rstrip(".")


def _ids(value: str) -> list[str]:
    return _REFERENCE.findall(value)


def _element(
    source: ElementTree.Element, tag: str, attributes: dict[str, str]
) -> ElementTree.Element:
    made = ElementTree.Element(tag, attributes)
    made.text = source.text if tag in {"text", "tspan"} else None
    return made
