"""HTML made of small pieces. What is not `Html` is escaped: nothing that a run says becomes markup."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from oat_dist.report.style import CSS

__all__ = [
    "Html",
    "details",
    "document",
    "escape",
    "facts",
    "figure",
    "join",
    "percent",
    "section",
    "table",
    "tag",
]

# Nothing is fetched, nothing is run: the page is its own proof.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


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
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(value)}"' for key, value in attributes.items() if value
    )
    return Html(f"<{name}{written}>{escape(content)}</{name}>")


def section(title: str, *content: Any) -> Html:
    return tag("section", join([tag("h2", title), *content]))


def details(summary: str, content: Any, *, opened: bool = False) -> Html:
    return Html(f"<details{' open' if opened else ''}>{tag('summary', summary)}\n{escape(content)}</details>")


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
    parts = [tag("caption", caption)] if caption else []
    parts += [tag("thead", tag("tr", join(top, ""))), tag("tbody", join(lines))]
    return tag("div", tag("table", join(parts), class_=class_), class_="scroll")


def figure(title: str, svg: Html, caption: Any) -> Html:
    return tag("figure", join([tag("h3", title), svg, tag("figcaption", caption)]))


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
