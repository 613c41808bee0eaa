"""Reports in a real headless browser: nothing is fetched, nothing fails, everything is there and can be read."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
from browsing import PHONE, SCREEN, launch, measure, opened, pages_of_pdf
from conftest import synthetic_photo
from made_runs import Made, make_run
from PIL import Image
from playwright.sync_api import Browser

from oat_dist.data.index import ShardSet
from oat_dist.data.packing import write_shards
from oat_dist.data.packing.samples import Sample
from oat_dist.report import write_comparison, write_report

FIGURES = {
    "digits": [
        *("Accuracy", "Training loss", "Anchor by class", "Anchor", "Learning rate", "Throughput"),
        *("Confusion matrix under “batch”", "Class balance"),
    ],
    "comparison": ["Accuracy over training", "Training loss"],
}
FIGURES["photos"] = FIGURES["digits"]
PICTURES = {"digits": 18 + 12 + 8, "photos": 18, "comparison": 12 + 8}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with launch() as found:
        yield found


@pytest.fixture(scope="module")
def pages(digits: dict[str, ShardSet], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run on digits against another one; one on photos of 30 classes with long names; a comparison of three runs."""
    folder = tmp_path_factory.mktemp("pages")
    oat = make_run(folder / "digits-oat", digits["test"], Made())
    again = make_run(folder / "digits-oat-seed-1", digits["test"], Made(seed=1))
    ce = make_run(folder / "digits-cross-entropy", digits["test"], Made(oat=False, skill=0.7))
    for split in ("train", "test"):
        samples = [
            Sample(f"{i:03d}.jpg", f"{'猫' if i % 3 else 'Category'}-{i % 30} with a rather long name", photo(i))
            for i in range(90)
        ]
        shards = write_shards(samples, folder / "set" / split, shard_samples=100)
    photos = make_run(folder / "photos", shards, Made(skill=0.6))
    return {
        "digits": write_report(oat, against=ce),
        "photos": write_report(photos),
        "comparison": write_comparison([oat, again, ce], folder / "compare.html"),
    }


def photo(number: int) -> bytes:
    image = Image.open(io.BytesIO(synthetic_photo(2 * number))).convert("RGB")
    file = io.BytesIO()
    image.resize((320, 200) if number % 2 else (200, 320)).save(file, "JPEG")
    return file.getvalue()


@pytest.mark.parametrize("name", ["digits", "photos", "comparison"])
def test_a_page_on_a_screen_and_on_a_phone(browser: Browser, pages: dict[str, Path], name: str) -> None:
    with opened(browser, pages[name]) as found:
        page = found.page
        for size, scheme in ((SCREEN, "light"), (SCREEN, "dark"), (PHONE, "dark"), (PHONE, "light")):
            page.set_viewport_size({"width": size[0], "height": size[1]})
            page.emulate_media(color_scheme=scheme)
            wrong = measure(page)
            assert wrong.pop("overflow") <= 0
            assert not any(wrong.values()), (size, scheme, wrong)
            behind = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert behind == ("rgb(20, 24, 31)" if scheme == "dark" else "rgb(255, 255, 255)")
        titles = page.locator("figure h3:visible").all_text_contents()
        assert sorted(titles) == sorted(FIGURES[name])
        assert page.locator("img").count() == PICTURES[name]
        assert found.said == [] and found.requested == []


def test_links_lead_to_sections_and_details_open(browser: Browser, pages: dict[str, Path]) -> None:
    with opened(browser, pages["digits"]) as found:
        links = found.page.locator("nav a")
        assert links.count() == found.page.locator("section > h2").count() == 11
        for target in links.evaluate_all("all => all.map(a => a.getAttribute('href').slice(1))"):
            assert found.page.locator(f"[id='{target}'] > h2").is_visible()
        folded = found.page.locator("details:not([open]) > summary")
        for _ in range(folded.count()):
            folded.first.click()
        assert folded.count() == 0
        wrong = measure(found.page)  # what was folded can be read too
        assert wrong["faint"] == wrong["empty"] == wrong["cut"] == [] and wrong["overflow"] <= 0
        assert found.said == []


@pytest.mark.parametrize("name", ["digits", "comparison"])
def test_print(browser: Browser, pages: dict[str, Path], name: str) -> None:
    with opened(browser, pages[name], scheme="dark") as found:
        found.page.emulate_media(media="print")
        wrong = measure(found.page)
        assert wrong["faint"] == wrong["empty"] == []  # in the light colours, whatever the reader's screen has
        assert found.page.evaluate("getComputedStyle(document.body).color") == "rgb(27, 34, 48)"
        assert not found.page.locator("nav").is_visible()
        if name == "digits":
            assert found.page.get_by_text("output_dir: runs/digits-oat").is_visible()  # folded on the screen
            assert not found.page.get_by_text("Every validation").is_visible()
        assert 2 <= pages_of_pdf(found.page.pdf(format="A4")) <= 14


def test_the_measures_find_what_is_wrong(browser: Browser, tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text(
        '<!DOCTYPE html><meta http-equiv="Content-Security-Policy" content="script-src \'none\'"><body>'
        '<p style="color:#999">faint</p><p style="font-size:6px">tiny</p><div style="width:2000px">wide</div>'
        '<img src="data:image/png;base64,AAAA" alt="broken"><img src="gone.png"><script>1</script>'
        '<figure><svg role="img" viewBox="0 0 99 99" width="99"><text x="90" y="50">out of it</text>'
        '<text x="2" y="20">one</text><text x="4" y="22">two</text></svg></figure>'
    )
    with opened(browser, bad) as found:
        wrong = measure(found.page)
        assert [text.partition(" (")[0] for text in wrong["faint"]] == ["faint"] and wrong["tiny"] == ["tiny"]
        assert wrong["cut"] == ["out of it"] and wrong["overlapping"] == ["two / one"] and wrong["overflow"] > 0
        assert "broken" in wrong["empty"]
        assert found.said and [url.rpartition("/")[2] for url in found.requested] == ["gone.png"]
