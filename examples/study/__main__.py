"""Train and evaluate the arms of a study, and write its table: python -m examples.study --help"""

from examples.study import report, runs
from schemas.cli import parse, run


def main() -> None:
    options = parse(runs.Options)
    runs.run(options)
    path = options.rows / f"{options.scale}-tier-{options.tier}.png"
    report.draw_plot(options, path)
    print(f"\n{report.format_table(options)}\n\nplot: {path}")


if __name__ == "__main__":
    run(main, outlives_reader=True, decodes=True, resumes=True)
