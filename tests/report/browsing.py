"""A real browser without a window, and what can be measured of a page in it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

__all__ = ["PHONE", "SCREEN", "Opened", "launch", "measure", "opened", "pages_of_pdf"]

SCREEN, PHONE = (1100, 900), (360, 740)
_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@contextmanager
def launch() -> Iterator[Browser]:
    """The system's Chromium; skips the test where there is none."""
    path = next((found for name in _NAMES if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"needs a browser, one of {', '.join(_NAMES)} (Debian: apt-get install chromium)")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"])
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Opened:
    """A page and what it said while it was opened: console messages, errors, requests for anything but itself."""

    page: Page
    said: list[str] = field(default_factory=list)
    requested: list[str] = field(default_factory=list)


@contextmanager
def opened(browser: Browser, path: Path, size: tuple[int, int] = SCREEN, scheme: Any = "light") -> Iterator[Opened]:
    context = browser.new_context(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
    found = Opened(context.new_page())
    found.page.on("console", lambda message: found.said.append(f"{message.type}: {message.text}"))
    found.page.on("pageerror", lambda error: found.said.append(str(error)))
    found.page.on("request", lambda request: found.requested.append(request.url))
    try:
        found.page.goto(path.as_uri())
        found.requested = [url for url in found.requested if url != path.as_uri() and not url.startswith("data:")]
        yield found
    finally:
        context.close()


def measure(page: Page) -> dict[str, Any]:
    """What is wrong with a page as it is shown now.

    Lists of texts: `faint` (contrast to what lies behind is below 4.5), `cut` (text of a drawing that reaches out of
    it), `tiny` (text smaller than 8 pixels), `empty` (figures, drawings, pictures without a size), `overlapping` (two
    texts of a drawing that lie on each other). `overflow` is by how many pixels the page is wider than the window.
    """
    return page.evaluate(_MEASURE)


def pages_of_pdf(data: bytes) -> int:
    assert data.startswith(b"%PDF")
    return data.count(b"/Type /Page") - data.count(b"/Type /Pages")


_MEASURE = """() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const paint = colours => {  // what the eye sees of colours laid over each other, on white
    canvas.fillStyle = '#fff'; canvas.fillRect(0, 0, 1, 1);
    for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const luminance = rgb => {
    const [r, g, b] = rgb.map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const known = new Map();
  const contrast = (behind, ink) => {
    const name = behind.join('|') + '|' + ink;
    if (!known.has(name)) {
      const [a, b] = [luminance(paint(behind)), luminance(paint([...behind, ink]))];
      known.set(name, (Math.max(a, b) + .05) / (Math.min(a, b) + .05));
    }
    return known.get(name);
  };
  const found = {faint: [], cut: [], tiny: [], empty: [], overlapping: []};
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const element = walk.currentNode.parentElement, text = walk.currentNode.textContent.trim();
    if (!text || !element.checkVisibility() || element.closest('style')) continue;
    const style = getComputedStyle(element), behind = [];
    for (let up = element; up; up = up.parentElement) behind.unshift(getComputedStyle(up).backgroundColor);
    const drawn = element.closest('svg');
    const ratio = contrast(behind, drawn ? style.fill : style.color);
    if (ratio < 4.5) found.faint.push(`${text.slice(0, 40)} (${ratio.toFixed(2)})`);
    const scale = drawn ? drawn.getScreenCTM().a : 1;
    if (parseFloat(style.fontSize) * scale < 8) found.tiny.push(text.slice(0, 40));
  }
  for (const drawn of document.querySelectorAll('svg[role=img]')) {
    if (!drawn.checkVisibility()) continue;
    const frame = drawn.getBoundingClientRect(), boxes = [];
    for (const text of drawn.querySelectorAll('text')) {
      const box = text.getBoundingClientRect(), words = text.textContent.trim().slice(0, 40);
      const sideways = box.left < frame.left - 1 || box.right > frame.right + 1;
      if (sideways || box.top < frame.top - 1 || box.bottom > frame.bottom + 1) found.cut.push(words);
      for (const [other, theirs] of boxes) {
        const wide = Math.min(box.right, other.right) - Math.max(box.left, other.left);
        const high = Math.min(box.bottom, other.bottom) - Math.max(box.top, other.top);
        if (wide > 3 && high > 4) found.overlapping.push(`${words} / ${theirs}`);
      }
      boxes.push([box, words]);
    }
  }
  for (const shown of document.querySelectorAll('figure, figure > svg, figure figcaption, img, section')) {
    const box = shown.getBoundingClientRect();
    if (shown.checkVisibility() && (box.width < 20 || box.height < 15)) found.empty.push(shown.outerHTML.slice(0, 80));
    if (shown.tagName === 'IMG' && !(shown.complete && shown.naturalWidth)) found.empty.push(shown.alt);
  }
  found.overflow = document.documentElement.scrollWidth - window.innerWidth;
  return found;
}"""
