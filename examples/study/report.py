"""Make the table and the plot of a study from its committed rows."""

import json
import statistics
from pathlib import Path
from typing import Any

from examples.study.arms import SCALES, describe_arm
from examples.study.runs import Options, choose_tier, get_row_path, list_runs
from train.evaluate.tables import format_spread


def load_rows(options: Options) -> dict[str, list[dict[str, Any]]]:
    """Return the finished runs of each arm, in the order of the arms."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for run in list_runs(options):
        path = get_row_path(options, run)
        if path.exists():
            rows.setdefault(run.arm, []).append(json.loads(path.read_text()))
    return rows


def format_table(options: Options) -> str:
    """Return the results as Markdown: top-1 in %, mean and standard deviation over seeds."""
    rows, tier = load_rows(options), choose_tier(options)
    done = sum(map(len, rows.values()))
    planned = len(tier.arms) * len(tier.seeds)
    config = SCALES[options.scale].config
    columns = list(
        dict.fromkeys(name for own in rows.values() for r in own for name in r["accuracy"])
    )
    lines = [
        f"{done} of {planned} runs are finished: {config.encoder}, "
        f"{config.crop_size or config.recipe.crop_size} px, batch {config.batch_size}, "
        f"{tier.epochs} epochs, seeds {', '.join(map(str, tier.seeds))}. Top-1 in %, mean ± "
        "standard deviation where there are several seeds.",
        "",
        f"| | {' | '.join(columns)} | runs | minutes |",
        "| --- |" + " ---: |" * (len(columns) + 2),
    ]
    for name, own in rows.items():
        cells = [
            format_spread([100 * row["accuracy"][c] for row in own if c in row["accuracy"]], 1)
            for c in columns
        ]
        minutes = statistics.median(row["train_seconds"] for row in own) / 60
        lines.append(f"| {describe_arm(name)} | {' | '.join(cells)} | {len(own)} | {minutes:.0f} |")
    return "\n".join(lines)


def draw_plot(options: Options, path: Path) -> None:
    """Draw the linear probe's accuracy of every arm: runs as dots, means as bars."""
    import matplotlib  # slow to import, and needed only here

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = load_rows(options)
    column = next(c for own in rows.values() for c in own[0]["accuracy"] if c.startswith("linear"))
    values = {
        describe_arm(n): [100 * r["accuracy"][column] for r in own] for n, own in rows.items()
    }
    figure, axes = pyplot.subplots(figsize=(8, 0.4 * len(values) + 1.2), layout="constrained")
    for place, own in enumerate(values.values()):
        axes.barh(place, statistics.mean(own), color="#9ecae1")
        axes.plot(own, [place] * len(own), "o", color="#08519c", markersize=4)
    axes.set_yticks(range(len(values)), list(values))
    axes.invert_yaxis()
    axes.set_xlabel(f"{column}, top-1 %")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
