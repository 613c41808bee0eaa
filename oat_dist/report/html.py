"""HTML made of small pieces. What is not `Html` is escaped: nothing that a run says becomes markup."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from oat_dist.report.style import CSS

__all__ = [
    "Html",
    "contents",
    "details",
    "document",
    "escape",
    "facts",
    "figure",
    "image",
    "join",
    "number",
    "percent",
    "section",
    "stats",
    "table",
    "tag",
    "warning_list",
]

# Nothing is fetched, nothing is run: the page is its own proof. Pictures lie in the page itself.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


def escape(value: Any) -> Html:
    """`value` as markup: `Html` as it is, anything else as escaped text."""
    return value if isinstance(value, Html) else Html(html.escape(str(value)))


def join(parts: Iterable[Any], between: str = "\n") -> Html:
    return Html(between.join(escape(part) for part in parts))


def tag(name: str, content: Any, **attributes: str) -> Html:
    """`<name ...>content</name>`; write `class_` for class, `aria_label` for aria-label."""
    return Html(f"<{name}{_written(attributes)}>{escape(content)}</{name}>")


def image(uri: str, alt: str, width: int, height: int, class_: str = "") -> Html:
    """A picture that lies in the page: `uri` is a data: URI."""
    sizes = {"width": str(width), "height": str(height)}
    return Html(f"<img{_written({'src': uri, 'alt': alt, **sizes, 'class_': class_})}>")


def _written(attributes: Mapping[str, str]) -> str:
    return "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(value)}"' for key, value in attributes.items() if value
    )


def section(title: str, *content: Any, note: Any = "") -> Html:
    """A section with its heading, to which `contents` links; `note` stands below the heading."""
    below = tag("p", note, class_="note") if note else ""
    return tag("section", join([tag("h2", title), below, *content]), id=_anchor(title))


def contents(sections: Sequence[Html]) -> Html:
    """Links to the sections."""
    titles = [found[1] for part in sections for found in re.finditer(r"<h2>([^<]+)</h2>", part)]
    links = [tag("a", Html(title), href=f"#{_anchor(html.unescape(title))}") for title in titles]
    return tag("nav", join(links), aria_label="Sections")


def _anchor(title: str) -> str:
    return "-".join(re.findall(r"[a-z0-9]+", title.lower()))


def details(summary: str, content: Any, *, opened: bool = False, printed: bool = True) -> Html:
    """A part that is folded, unless `opened`; on paper it is open, or left out where it is not `printed`."""
    kind = (" open" if opened else "") + ("" if printed else ' class="long"')
    return Html(f"<details{kind}>{tag('summary', summary)}\n{escape(content)}</details>")


def facts(values: Mapping[str, Any]) -> Html:
    """A list of names and values; None is left out."""
    rows = [tag("dt", key) + tag("dd", value) for key, value in values.items() if value is not None]
    return tag("dl", join(map(Html, rows)), class_="facts") if rows else Html("")


def table(head: Sequence[Any], rows: Sequence[Sequence[Any]], *, caption: str = "", class_: str = "") -> Html:
    """A table whose first column names the rows. A header that ends in "#" heads a column of numbers."""
    number = ["n" if str(cell).endswith("#") else "" for cell in head]
    top = [tag("th", str(c).removesuffix("#"), scope="col", class_=n) for c, n in zip(head, number, strict=True)]
    lines = []
    for row in rows:
        first = tag("th", row[0], scope="row", class_=number[0])
        cells = [tag("td", c, class_=n) for c, n in zip(row[1:], number[1:], strict=True)]
        lines.append(tag("tr", join([first, *cells], "")))
    parts = [tag("caption", tag("span", caption))] if caption else []
    parts += [tag("thead", tag("tr", join(top, ""))), tag("tbody", join(lines))]
    return tag("div", tag("table", join(parts), class_=class_), class_="scroll")


def figure(title: str, drawn: Any, caption: Any, *, class_: str = "") -> Html:
    return tag("figure", join([tag("h3", title), drawn, tag("figcaption", caption)]), class_=class_)


def stats(values: Sequence[tuple[str, Any, Any]]) -> Html:
    """Large numbers in a row: (what, number, note)."""
    tiles = [
        tag("div", join([tag("dt", what), tag("dd", number), tag("dd", note, class_="note") if note else ""]))
        for what, number, note in values
    ]
    return tag("dl", join(tiles), class_="stats") if tiles else Html("")


def warning_list(warnings: Sequence[Any]) -> Html:
    """The box of warnings; nothing where there are none."""
    if not warnings:
        return Html("")
    items = tag("ul", join(tag("li", warning) for warning in warnings))
    return tag("aside", join([tag("strong", "Warnings"), items]), class_="warn", aria_label="Warnings")


def document(title: str, *content: Any) -> str:
    """The whole page."""
    head = [
        Html('<meta charset="utf-8">'),
        Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'),
        tag("title", title),
        Html(f"<style>{CSS}</style>"),
    ]
    page = join([tag("head", join(head)), tag("body", tag("main", join(content)))])
    return f'<!DOCTYPE html>\n<html lang="en">\n{page}\n</html>\n'


def percent(fraction: float) -> str:
    """A fraction of 1 as a percentage with two digits, without the sign."""
    return f"{100 * fraction:.2f}"


def number(value: Any) -> str:
    """A whole number with its thousands apart, "-" for anything else."""
    return f"{value:,}" if type(value) is int else "-"
