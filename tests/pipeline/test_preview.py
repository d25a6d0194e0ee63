"""The contact sheet and the command that writes it."""

import io
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import __main__ as command
from pipeline.contact_sheet import KEY, QUERY
from pipeline.preview import FOREGROUND, decode_sample, draw_view, outline_foreground_
from schemas import ShardDataset, UserError
from schemas.cli import run
from schemas.tables import SAMPLES
from tests.browser import shown
from tests.pipeline.conftest import small


def preview(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["pipeline", "preview", *arguments])
    command.main()


def find_line_colors(path: Path) -> set[tuple[int, ...]]:
    """Return the colors of more than 50 pixels: those of lines, not of pictures by chance."""
    pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)
    values, counts = np.unique(pixels, axis=0, return_counts=True)
    return set(map(tuple, values[counts > 50].tolist()))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["hp", "none"])
def test_a_sheet_is_written(
    dataset: ShardDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    out = tmp_path / "sheet.png"
    arguments = ["--data", dataset.url, "--recipe", recipe, "--out", str(out)]
    preview(monkeypatch, *arguments, "--samples", "3", "--crop-size", "56")
    actual = find_line_colors(out)
    assert {QUERY, KEY} <= actual
    assert (FOREGROUND in actual) == (recipe == "hp")
    page = out.with_suffix(".html").read_text()
    assert page.count("<section>") == 3
    assert page.count("data:image/png;base64,") == 3 * (7 if recipe == "hp" else 6)
    assert set(re.findall(r'(?:src|href)="(?!data:)', page)) == set(), "it needs another file"
    assert ("ratio 0." in page) == (recipe == "hp")
    HTMLParser().feed(page)


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1400])
def test_a_browser_shows_the_page_at_phone_and_desktop_width(
    dataset: ShardDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    out = tmp_path / "sheet.png"
    preview(
        monkeypatch, "--data", dataset.url, "--out", str(out), "--samples", "3",
        "--crop-size", "56",
    )  # fmt: skip
    assert shown(out.with_suffix(".html"), tmp_path, width, "section img") == 3 * 7


@pytest.mark.slow
def test_more_samples_and_hard_negatives_make_a_larger_sheet(
    dataset: ShardDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {}
    for samples, hard in ((1, 1), (2, 1), (1, 2)):
        out = tmp_path / "sheet.png"
        arguments = ["--data", dataset.url, "--out", str(out), "--crop-size", "56"]
        arguments += ["--samples", str(samples), "--recipe.hard-negatives", str(hard)]
        preview(monkeypatch, *arguments)
        sizes[samples, hard] = Image.open(out).size
    assert sizes[2, 1][1] > sizes[1, 1][1]
    assert sizes[1, 2][0] > sizes[1, 1][0]


@pytest.mark.slow
def test_a_sheet_needs_no_table_of_all_samples(
    dataset: ShardDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table has 8 GB at 10^8 samples; with more, there is none."""
    other = shutil.copytree(dataset.url, tmp_path / "other")
    (other / SAMPLES).unlink()
    sheets = []
    for data in (dataset.url, str(other)):
        out = tmp_path / "sheet.png"
        preview(
            monkeypatch, "--data", data, "--out", str(out), "--samples", "5", "--crop-size", "56"
        )
        sheets.append(out.read_bytes())
    assert sheets[0] == sheets[1]


def test_the_outline_runs_around_the_foreground() -> None:
    tile = Image.new("RGB", (224, 224))
    is_foreground = np.zeros((7, 7), bool)
    is_foreground[2, 3] = True
    outline_foreground_(tile, is_foreground)
    rows, columns = (np.asarray(tile) == FOREGROUND).all(-1).nonzero()
    # cell (2, 3) covers rows 64 .. 96 and columns 96 .. 128; lines are two pixels wide
    assert (rows.min(), rows.max()) == pytest.approx((64, 96), abs=2)
    assert (columns.min(), columns.max()) == pytest.approx((96, 128), abs=2)


def test_a_high_pass_view_is_shown_around_middle_gray() -> None:
    tile = draw_view(torch.zeros(3, 56, 56), small("mscn"))
    assert np.unique(np.asarray(tile)).tolist() == [128]


def test_16_bits_are_scaled_as_the_loader_does_it() -> None:
    files = []
    for pixels in (np.full((8, 8), 127 * 257, np.uint16), np.zeros((28, 28), np.uint8)):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        files.append(np.frombuffer(buffer.getvalue(), np.uint8))
    image, _ = decode_sample(*files)
    assert image.mode == "RGB"
    assert set(np.asarray(image).ravel().tolist()) == {127}


def test_mistakes_end_with_one_line(
    dataset: ShardDataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.argv", ["pipeline", "preview", "--data", "x", "--recipe", "hpp"])
    with pytest.raises(SystemExit) as stop:
        run(command.main)
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: unknown recipe 'hpp': did you mean hp?")
    monkeypatch.setattr("sys.argv", ["pipeline", "previw"])
    with pytest.raises(UserError, match="unknown command 'previw': did you mean preview"):
        command.main()
    with pytest.raises(UserError, match=r"sheet\.html: give the name of the picture, .*\.png;"):
        preview(monkeypatch, "--data", dataset.url, "--out", str(tmp_path / "sheet.html"))
    out = tmp_path / "missing" / "sheet.png"
    with pytest.raises(UserError, match="cannot be written"):
        preview(
            monkeypatch, "--data", dataset.url, "--out", str(out), "--samples", "1",
            "--crop-size", "56",
        )  # fmt: skip
