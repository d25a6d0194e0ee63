"""The report of a run: its content, and its layout in a real browser."""

from html.parser import HTMLParser
from pathlib import Path

import pytest

from schemas import UserError
from tests.browser import shown
from train.report import ReportOptions, render_results, write_report


class Page(HTMLParser):
    """Collects ids of figures, sources of pictures, and all text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.figures: list[str] = []
        self.sources: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if tag == "figure" and "id" in values:
            self.figures.append(values["id"])
        self.sources += [values[name] for name in ("src", "href") if tag != "a" and name in values]

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def report(run, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("report") / "report.html"
    return write_report(ReportOptions(run=str(run), out=str(out)))


def test_curves_views_and_configuration_are_on_one_page_without_a_network(report):
    page = Page(report.read_text())
    assert page.figures == [
        "loss", "accuracy", "similarity", "lr", "images_per_second", "data_wait", "scores",
    ]  # fmt: skip
    pictures = [source for source in page.sources if source.startswith("data:image/png")]
    assert len(pictures) == 2  # from the first and the last epoch
    assert all(not source.startswith("http") for source in page.sources)
    assert "epoch-0001" in page.text
    assert "mean cosine similarity to the query" in page.text
    for name in ("key", "hard negative", "queue or batch", "among these and hard negatives"):
        assert (
            f"<!-- {name} -->" in report.read_text()
        )  # matplotlib writes the texts of a legend as comments
    assert "epoch-0002" in page.text
    assert "ema_momentum: 0.999" in page.text


def test_accuracies_name_what_was_measured():
    row = {"data": "photos", "time": "now"}
    text = render_results(
        [
            row | {"protocol": "knn", "accuracy": {"20": 0.5, "200": 0.335}},
            row | {"protocol": "linear", "accuracy": {"top-1": 0.25}},
        ]
    )
    assert "k = 20: 50.00 %, k = 200: 33.50 %" in text
    assert "top-1 25.00 %" in text


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1400])
def test_a_browser_shows_it_at_phone_and_desktop_width(report, tmp_path, width):
    assert shown(report, tmp_path, width, "figure svg path, figure svg polyline") >= 6


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no metrics.jsonl; is it the folder of a run"):
        write_report(ReportOptions(run=str(tmp_path)))
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(UserError, match="no step is finished yet"):
        write_report(ReportOptions(run=str(tmp_path)))


def test_a_page_that_cannot_be_written_is_named(run, tmp_path):
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "report.html"
    with pytest.raises(UserError, match=r"report.html: a file is in the way of a folder"):
        write_report(ReportOptions(run=str(run), out=str(out)))
