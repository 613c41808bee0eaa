"""A report read back: is it well-formed, and what does it say?"""

from __future__ import annotations

import html
import re
from html.parser import HTMLParser
from pathlib import Path

__all__ = ["Page"]


class Page(HTMLParser):
    """Checks that tags balance; collects tags and ids, and the text outside of <style>."""

    VOID = frozenset({"meta", "br", "hr", "img", "link", "input"})

    def __init__(self, page: Path | str) -> None:
        """`page` is a file, or the text of a page or of a part of one."""
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.source = page.read_bytes().decode() if isinstance(page, Path) else str(page)
        self.feed(self.source)
        self.close()
        assert self.open == [], f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert len({name for name, _ in attrs}) == len(attrs), f"an attribute twice in <{tag}>"
        self.attributes += [(name, value or "") for name, value in attrs]
        self.ids += [value or "" for name, value in attrs if name == "id"]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def images(self) -> int:
        """How many drawings there are, without the samples of lines in their keys."""
        return sum(value == "img" for name, value in self.attributes if name == "role")

    def section(self, title: str) -> str:
        """The text of one section."""
        start = self.source.index(f"<h2>{title}")
        end = self.source.find("<h2>", start + 4)
        words = re.sub(r"<[^>]*>", " ", self.source[start : end if end > 0 else len(self.source)])
        return " ".join(html.unescape(words).split())

    @property
    def text(self) -> str:
        return " ".join("\n".join(self.words).split())
