"""Text that others wrote, made safe for where it goes: a terminal, Markdown, HTML and XML.

Names of classes, layers, processors and packages come with files from anybody. Every way out of
this tool passes through here: what is not printable is spelt out, control characters, marks that
turn the direction of a line and halves of characters among it; and what a page would take for
structure is escaped.
"""

from __future__ import annotations

import re

_LEADING = re.compile(r"^(\s*)([#+\-=>*]|\d{1,9}(?=[.)]))")
_INLINE = re.compile(
    r"[\\`<~$|]"  # escapes, code, tags and links in brackets, struck out, formulas, cells
    r"|!(?=\[)|\](?=[(\[:])|\[(?=\^)"  # images, links and what they refer to, footnotes
    r"|&(?=#?\w+;)"  # entities
    r"|(?<!\S)\*(?=\S)|(?<=\S)\*|(?<![^\W_])_|_(?![^\W_])"  # emphasis
    r"|:(?=//)|(?<=www)\."  # addresses, which become links by themselves
)


NO_BREAK = "\N{NO-BREAK SPACE}"
_WITHIN_FIGURE = re.compile(
    r"(?<=\d) (?=[a-zA-Z%]{1,3}\b|%)|(?<=x) (?=\d)|(?<=\d,) (?=[-+\d])|(?<=\bbatch) (?=\d)"
)


def plain(text: str) -> str:
    """Return a text as one line of printable letters, everything else spelt out: ``\\x1b``."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def lines(text: str) -> str:
    """Return a text for a terminal: its lines are kept, and each is plain."""
    return text if text.isprintable() else "\n".join(map(plain, text.split("\n")))


def markdown(text: str, *, begins: bool = True) -> str:
    """Return a text that Markdown, and GitHub's, shows as it is.

    Args:
        text: the text.
        begins: whether it begins a line or an item of a list, where a number or a dash has meaning.
    """
    shown = _INLINE.sub(r"\\\g<0>", plain(text))
    found = _LEADING.match(shown) if begins else None
    if found is None:
        return shown
    start = found.end(2) if found[2].isdecimal() else found.start(2)
    return f"{shown[:start]}\\{shown[start:]}"


def together(text: str) -> str:
    """Return figures so that none is parted from its unit, nor an interval, at a line's end."""
    return _WITHIN_FIGURE.sub(NO_BREAK, text)
