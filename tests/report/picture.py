"""The README's picture of a report: parts of the page that compares two runs, as a browser shows them.

python tests/report/picture.py runs/cifar10-oat runs/cifar10-ce docs/report.png
"""

from __future__ import annotations

import argparse
import io
import tempfile
from pathlib import Path

from browsing import launch, opened
from PIL import Image

from oat_dist.files import write_atomic
from oat_dist.report import write_comparison

WIDTH = 1000
_MOST_BYTES = 200_000
# The headline, the curves and the gallery, without what has to be read slowly.
_HIDDEN = (
    "nav, .warn, section:not([id^='curves']):not([id^='right-with']), [id^='right-with'] h3 ~ *, [id^='right-with'] h3"
)


def take(runs: list[Path], output: Path, labels: list[str] | None = None, data: str | None = None) -> None:
    """Write a PNG 1,000 pixels wide and smaller than 200 kB."""
    with tempfile.TemporaryDirectory() as folder, launch() as browser:
        page = write_comparison(runs, Path(folder) / "compare.html", labels=labels, data=data)
        with opened(browser, page, (WIDTH, 800)) as found:
            found.page.add_style_tag(content=f"{_HIDDEN}{{display:none!important}}body{{padding-bottom:1rem}}")
            shot = found.page.screenshot(full_page=True)
    image = Image.open(io.BytesIO(shot)).convert("RGB")
    for colours in (256, 128, 64):
        file = io.BytesIO()
        image.quantize(colours, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(
            file, "PNG", optimize=True
        )
        if file.tell() < _MOST_BYTES:
            break
    write_atomic(output, file.getvalue())
    print(f"{output}: {image.width} x {image.height}, {file.tell():,} bytes, {colours} colours")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("output", type=Path, metavar="FILE.png")
    parser.add_argument("--labels", help="names of the runs, with commas")
    parser.add_argument("--data", help="where the data set lies, if not where the configuration says")
    arguments = parser.parse_args()
    names = None if arguments.labels is None else arguments.labels.split(",")
    take(arguments.runs, arguments.output, names, arguments.data)
