"""Write one HTML page that shows a run: `saliency-report RUN`.

It holds curves, the views of the first and the last epoch, evaluations, the configuration and how
the run was started, and needs no other file and no network.
"""

import base64
import html
import io
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from schemas import UserError
from schemas.cli import parse, run
from schemas.counts import format_count
from schemas.json_lines import read_json_lines
from schemas.settings import flatten
from schemas.storage import translate_os_errors, write_atomically
from train.metrics_logger import is_step
from train.option_ranges import check_ranges
from train.run_info import RESULTS

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
        "share of queries whose key is the most similar",
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
            "batch_similarity": "queries of other images",
            "negatives_similarity": "queue or batch",
        },
    ),
    "lr": ("learning rate", {"lr": "learning rate"}),
    "images_per_second": ("images/s", {"images_per_second": "images/s"}),
    "data_wait": ("seconds per step spent waiting for data", {"data_wait": "seconds"}),
}
"""Figures by id: a caption, and names in metrics.jsonl with their labels in the legend."""


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Write a page with curves, views, evaluations and configuration of a run."""

    run: Annotated[str, tyro.conf.Positional] = tyro.MISSING
    """Folder of the run."""
    out: str | None = None
    """File to write; by default report.html in the run's folder."""


def write_report(options: ReportOptions) -> Path:
    """Write the page and return its path.

    Raises:
        UserError: the folder holds no run, or the page cannot be written.
    """
    check_ranges(flatten(options))
    folder = Path(options.run)
    metrics = folder / "metrics.jsonl"
    if not metrics.is_file():
        raise UserError(f"{folder}: no metrics.jsonl; is it the folder of a run?")
    rows = read_json_lines(metrics)
    if not rows:
        raise UserError(f"{metrics}: no step is finished yet")
    out = Path(options.out or folder / "report.html")
    page = render_page(folder, rows)
    with translate_os_errors(str(out)):
        write_atomically(out, page.encode())
    return out


def number_steps(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows with `steps_made`, the number of steps until then.

    That equals `step`, unless the run was resumed with another batch, which converts `step`.
    """
    steps_made = itertools.accumulate(is_step(row) for row in rows)
    return [row | {"steps_made": number} for row, number in zip(rows, steps_made, strict=True)]


def render_page(folder: Path, rows: list[dict[str, Any]]) -> str:
    """Render the HTML of the page."""
    rows = number_steps(rows)
    steps = [row for row in rows if is_step(row)]
    title = f"{folder.name}: {format_count(len(steps), 'step')}, "
    title += format_count(steps[-1]["epoch"], "epoch")
    parts = [f"<h1>{html.escape(title)}</h1>", '<div class="curves">']
    for name, (label, names) in CURVES.items():
        logged = {n: line for n, line in names.items() if any(n in row for row in steps)}
        lines = {
            line: [(row["steps_made"], row.get(n)) for row in steps] for n, line in logged.items()
        }
        parts.append(render_curves(name, label, lines))
    epochs = [row for row in rows if not is_step(row)]
    scores = sorted(
        {name for row in epochs for name in row.keys() - {"step", "epoch", "steps_made"}}
    )
    if scores:
        points = {n: [(row["steps_made"], row[n]) for row in epochs if n in row] for n in scores}
        parts.append(render_curves("scores", "accuracy on labeled shards", points))
    parts.append("</div>")

    views = sorted((folder / "views").glob("epoch-*.png"))
    if views:
        parts.append("<h2>Network inputs</h2>")
        for path in dict.fromkeys([views[0], views[-1]]):
            content = base64.b64encode(path.read_bytes()).decode()
            parts.append(
                f'<figure><img alt="views of {path.stem}" src="data:image/png;base64,{content}">'
                f"<figcaption>{path.stem}</figcaption></figure>"
            )
    if (folder / RESULTS).is_file():
        parts += ["<h2>Evaluations</h2>", render_results(read_json_lines(folder / RESULTS))]
    if (folder / "starts.jsonl").is_file():
        parts += ["<h2>Starts</h2>", render_starts(read_json_lines(folder / "starts.jsonl"))]
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


def render_curves(name: str, label: str, lines: dict[str, list[tuple[int, float | None]]]) -> str:
    """Render one figure of curves over steps as inline SVG; return "" if there are no points."""
    import matplotlib  # slow to import; only reports need it

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 2.6), layout="constrained")
    total = 0
    for line, points in lines.items():
        present = [(step, value) for step, value in points if value is not None]
        total += len(present)
        steps, values = [step for step, _ in present], [value for _, value in present]
        axes.plot(steps, values, "o-" if len(present) < 30 else "-", label=line, ms=3, lw=1.2)
    axes.set_xlabel("step")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    if len(lines) > 1:
        axes.legend(fontsize=8)
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    if not total:
        return ""
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :].replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
    return f'<figure id="{name}">{svg}<figcaption>{html.escape(label)}</figcaption></figure>'


def render_results(rows: list[dict[str, Any]]) -> str:
    cells = [
        (
            row["protocol"],
            row["data"],
            ", ".join(
                f"{f'k = {name}:' if row['protocol'] == 'knn' else name} {100 * value:.2f} %"
                for name, value in row["accuracy"].items()
            ),
            row.get("weights", "trained"),
            row["time"],
        )
        for row in rows
    ]
    return render_table(("protocol", "data", "accuracy", "weights", "time"), cells)


def render_starts(rows: list[dict[str, Any]]) -> str:
    cells = [
        (row["time"], row["after_step"], f"{row['processes']} x {row['device']}", row["command"])
        for row in rows
    ]
    return render_table(("time", "after step", "processes", "command"), cells)


def render_table(heads: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    head = "".join(f"<th>{name}</th>" for name in heads)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def main() -> None:
    print(write_report(parse(ReportOptions)))


def start() -> None:
    run(main)


if __name__ == "__main__":
    start()
