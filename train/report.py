"""One page that shows a run: `python -m train.report RUN`.

Curves, the views of the first and the last epoch, evaluations, the configuration and how the run
was started, in one HTML file that needs no other and no network.
"""

import base64
import html
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from schemas import UserError
from schemas.cli import parse, run
from train.evaluate.results import RESULTS
from train.metrics_logger import is_step

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 1.5rem auto; padding: 0 1rem;
       max-width: 70rem; background: #fafaf8; color: #1e1e1e }
h1 { font-size: 1.3rem; overflow-wrap: anywhere } h2 { font-size: 1.05rem; margin-top: 2rem }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr));
          gap: 1rem }
figure { margin: 0 } figure svg { width: 100%; height: auto; display: block }
figure img { max-width: 100%; height: auto; display: block }
figcaption { color: #666; font-size: 0.85rem }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: 0.9rem }
th, td { text-align: left; padding: 0.25rem 0.75rem 0.25rem 0; border-bottom: 1px solid #ddd;
         vertical-align: top }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 0.8rem; background: #f0f0ec;
      padding: 0.75rem }
"""

CURVES: dict[str, tuple[str, dict[str, str]]] = {
    "loss": ("loss", {"loss": "loss"}),
    "accuracy": (
        "how often the key is the most similar",
        {
            "negatives_accuracy": "among queue or batch",
            "contrastive_accuracy": "among these and hard negatives",
        },
    ),
    "classification": ("accuracy on the training labels", {"accuracy": "accuracy"}),
    "similarity": (
        "mean cosine similarity to the query",
        {
            "key_similarity": "key",
            "hard_similarity": "hard negative",
            "negatives_similarity": "queue or batch",
        },
    ),
    "lr": ("learning rate", {"lr": "learning rate"}),
    "images_per_second": ("images/s", {"images_per_second": "images/s"}),
    "data_wait": ("seconds a step waited for data", {"data_wait": "seconds"}),
}
"""Figures by their id: a label, and names in metrics.jsonl with what a legend calls them."""


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Write RUN/report.html."""

    run: Annotated[str, tyro.conf.Positional] = tyro.MISSING
    """A run's folder."""
    out: str | None = None
    """The page; report.html in the run's folder when not given."""


def write_report(options: ReportOptions) -> Path:
    """Write the page and return its path.

    Raises:
        UserError: the folder holds no run.
    """
    folder = Path(options.run)
    metrics = folder / "metrics.jsonl"
    if not metrics.is_file():
        raise UserError(f"{folder}: no metrics.jsonl; is it the folder of a run?")
    rows = lines_of(metrics)
    if not rows:
        raise UserError(f"{metrics}: no step is finished yet")
    out = Path(options.out or folder / "report.html")
    out.write_text(page(folder, rows))
    return out


def page(folder: Path, rows: list[dict[str, Any]]) -> str:
    """The page's HTML."""
    steps = [row for row in rows if is_step(row)]
    title = f"{folder.name}: {len(steps)} steps, {steps[-1]['epoch']} epochs"
    parts = [f"<h1>{html.escape(title)}</h1>", '<div class="curves">']
    for name, (label, names) in CURVES.items():
        known = {n: line for n, line in names.items() if any(n in row for row in steps)}
        lines = {line: [(row["step"], row.get(n)) for row in steps] for n, line in known.items()}
        parts.append(curve(name, label, lines))
    epochs = [row for row in rows if not is_step(row)]
    scores = sorted({name for row in epochs for name in row.keys() - {"step", "epoch"}})
    if scores:
        found = {n: [(row["step"], row[n]) for row in epochs if n in row] for n in scores}
        parts.append(curve("scores", "accuracy on labelled shards", found))
    parts.append("</div>")

    views = sorted((folder / "views").glob("epoch-*.png"))
    if views:
        parts.append("<h2>Views, as fed</h2>")
        for path in dict.fromkeys([views[0], views[-1]]):
            content = base64.b64encode(path.read_bytes()).decode()
            parts.append(
                f'<figure><img alt="views of {path.stem}" src="data:image/png;base64,{content}">'
                f"<figcaption>{path.stem}</figcaption></figure>"
            )
    if (folder / RESULTS).is_file():
        parts += ["<h2>Evaluations</h2>", results_table(lines_of(folder / RESULTS))]
    if (folder / "starts.jsonl").is_file():
        parts += ["<h2>Starts</h2>", starts_table(lines_of(folder / "starts.jsonl"))]
    if (folder / "config.yaml").is_file():
        text = html.escape((folder / "config.yaml").read_text())
        parts.append(f"<h2>Configuration</h2>\n<pre>{text}</pre>")
    return (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n"
        + "\n".join(parts)
        + "\n</html>\n"
    )


def curve(name: str, label: str, lines: dict[str, list[tuple[int, float | None]]]) -> str:
    """One figure of curves over steps, as inline SVG; nothing where no point is known."""
    import matplotlib  # slow to import, and needed for reports alone

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 2.6), layout="constrained")
    known = 0
    for line, points in lines.items():
        found = [(step, value) for step, value in points if value is not None]
        known += len(found)
        steps, values = [step for step, _ in found], [value for _, value in found]
        axes.plot(steps, values, "o-" if len(found) < 30 else "-", label=line, ms=3, lw=1.2)
    axes.set_xlabel("step")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    if len(lines) > 1:
        axes.legend(fontsize=8)
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    if not known:
        return ""
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :].replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
    return f'<figure id="{name}">{svg}<figcaption>{html.escape(label)}</figcaption></figure>'


def results_table(rows: list[dict[str, Any]]) -> str:
    cells = [
        (
            row["protocol"],
            row["data"],
            ", ".join(f"{name} {100 * value:.2f} %" for name, value in row["accuracy"].items()),
            row.get("weights", "trained"),
            row["time"],
        )
        for row in rows
    ]
    return table(("protocol", "data", "accuracy", "weights", "time"), cells)


def starts_table(rows: list[dict[str, Any]]) -> str:
    cells = [
        (row["time"], row["after_step"], f"{row['processes']} x {row['device']}", row["command"])
        for row in rows
    ]
    return table(("time", "after step", "processes", "command"), cells)


def table(heads: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    head = "".join(f"<th>{name}</th>" for name in heads)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def main() -> None:
    print(write_report(parse(ReportOptions)))


def start() -> None:
    run(main)


if __name__ == "__main__":
    start()
