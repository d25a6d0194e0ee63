"""Open a page in a headless browser."""

import html
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next((path for path in map(shutil.which, NAMES) if path), None)

FRAME = """<!doctype html><title></title><body style="margin:0">
<iframe style="border:0;width:{width}px;height:900px" srcdoc="{page}"></iframe>"""
"""A page in a frame: a browser window is at least 500 pixels wide, and a phone's is narrower."""

MEASURE = """<script>addEventListener("load", () => {{
    const broken = [...document.images].filter(one => !one.naturalWidth).length
    parent.document.title = [document.documentElement.scrollWidth, broken,
        document.querySelectorAll("{selector}").length].join(" ")
}})</script>"""


def shown(page: Path, folder: Path, width: int, selector: str) -> int:
    """Show a page in a frame of `width` pixels; return how many elements `selector` finds on it.

    Checks that there is no console message, that every picture loads, that nothing extends over the
    right edge, and that something is visible. A screenshot stays in `folder`.
    """
    if BROWSER is None:
        pytest.skip("no chromium here")
    measured = page.read_text() + MEASURE.format(selector=selector)
    frame, picture = folder / "frame.html", folder / f"page-{width}.png"
    frame.write_text(FRAME.format(width=width, page=html.escape(measured)))
    common = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        f"--user-data-dir={folder / 'profile'}", f"--window-size={max(500, width)},900",
        "--enable-logging=stderr",
    ]  # fmt: skip

    def browser(option: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*common, option, frame.as_uri()],
            capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip

    done = browser("--dump-dom")
    assert "CONSOLE" not in done.stderr
    title = done.stdout.split("<title>")[1].split("</title>")[0]
    scroll_width, broken, count = map(int, title.split())
    assert (scroll_width, broken) == (width, 0)
    browser(f"--screenshot={picture}")
    with Image.open(picture) as shot:
        assert len(shot.convert("L").getcolors()) > 20
    return count
