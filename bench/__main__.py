"""Run a benchmark on this machine.

python -m bench loader --data URL         views/s of the loader and of the usual ways, same images
python -m bench remote --data URL         first batch and rate from a slow S3, compared with local
python -m bench precompute --root PHOTOS  rate of the precompute job, compared with its ceilings
python -m bench fidelity --root PHOTOS    stored maps compared with online ones, on crops
python -m bench map-sides --root PHOTOS   cost of the stored maps' side, in IoU and bytes
python -m bench train --data URL          training steps: alone, fed, online saliency, released way
python -m bench order                     seconds and memory to plan a batch of 10^9 samples
python -m bench scale                     listing, planning, finishing and verifying at scale
python -m bench kernels                   GPU kernels and bytes of a batch's views, counted
python -m bench.gpu_session               checks and rates for the first session on a GPU
"""

import itertools
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.table import Row, describe_machine, format_table, list_rates, measure, write
from schemas.cli import parse, run, run_subcommand


def main() -> None:
    commands = {
        "loader": bench_loader,
        "remote": bench_remote,
        "precompute": bench_precompute,
        "fidelity": bench_fidelity,
        "map-sides": bench_map_sides,
        "train": bench_train,
        "order": bench_order,
        "scale": bench_scale,
        "kernels": bench_kernels,
    }
    run_subcommand(commands, __doc__)


# Each target imports only what it measures, so that it does not need other targets' packages, such
# as Ray.


def bench_loader(argv: Sequence[str]) -> None:
    from bench import loader

    options = parse(loader.Options, argv)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(loader.make_ways(options, Path(folder)), options.repeats)
    print(
        format_table("Loader", rows, loader.choose_baselines([row.name for row in rows])),
        end="\n\n",
    )
    finish(options.out, asdict(options), "Loader", rows)


def bench_remote(argv: Sequence[str]) -> None:
    from bench import remote

    options = parse(remote.Options, argv)
    with tempfile.TemporaryDirectory() as folder:
        figures = remote.measure(options, Path(folder))
    print(remote.report(figures, options))
    write(options.out, asdict(options), figures)


def bench_precompute(argv: Sequence[str]) -> None:
    from bench import precompute

    options = parse(precompute.Options, argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "cpu" in options.rows:
            print(precompute.measure_cpu_time(options, folder), end="\n\n", flush=True)
        if options.rows == ("cpu",):
            return
        rows = precompute.measure(options, folder)
        print(
            format_table(
                "Precompute", rows, precompute.choose_baselines([row.name for row in rows])
            ),
            end="\n\n",
        )
        early, late = precompute.measure_memory(options, folder)
        print(f"resident memory of a worker: {early:.0f} MB after 4 shards, {late:.0f} after 24")
        if options.finished_shards:
            seconds = precompute.measure_finished(options, folder)
            print(f"nothing to do in {options.finished_shards} shards: found in {seconds:.1f} s")
    finish(options.out, asdict(options), "Precompute", rows)


def bench_train(argv: Sequence[str]) -> None:
    from bench import train

    options = parse(train.Options, argv)
    with tempfile.TemporaryDirectory() as folder:
        trainers = train.build_trainers(options, Path(folder))
        rows = measure(train.make_ways(options, trainers), options.repeats)
    print(format_table("Training", rows, {}), end="\n\n")
    summary = train.summarize(rows, train.compute_wait_shares(trainers, rows, options))
    print(*summary, sep="\n")
    finish(options.out, {**asdict(options), "summary": summary}, "Training", rows)


def bench_order(argv: Sequence[str]) -> None:
    from bench import order

    print(order.build_table(parse(order.Options, argv)))


def bench_scale(argv: Sequence[str]) -> None:
    from bench import scale

    scale.show(parse(scale.Options, argv))


def bench_kernels(argv: Sequence[str]) -> None:
    from bench import kernels

    print(kernels.build_table(parse(kernels.Options, argv)))


def bench_fidelity(argv: Sequence[str]) -> None:
    from bench import fidelity

    options = parse(fidelity.Options, argv)
    study = fidelity.Study(options)
    areas = [f"{a} - {b}" for a, b in itertools.pairwise(fidelity.BINS)]
    head = ["IoU", "IoU before jitter", "cells equal", "difference of shares", *areas]
    print(f"### {len(study.crops)} crops of {len(study.shapes)} photos, {options.backbone}\n")
    print(f"| stored map | forwards | {' | '.join(head)} |")
    print("| --- |" + " ---: |" * (len(head) + 1))
    for row in study.compare_maps(options):
        print(row, flush=True)
    print(f"\n### {fidelity.SCENES} generated scenes\n")
    print("| estimator | foreground on the object | object covered |\n| --- | ---: | ---: |")
    for row in fidelity.compare_with_objects(options):
        print(row, flush=True)


def bench_map_sides(argv: Sequence[str]) -> None:
    from bench import fidelity, map_sides

    options = parse(map_sides.SideOptions, argv)
    study = fidelity.Study(options)
    print(f"### {len(study.crops)} crops of {len(study.shapes)} photos, {options.backbone}\n")
    print("| stored map | IoU | before jitter | IoU of a perfect estimator | bytes of its PNG |")
    print("| --- |" + " ---: |" * 4)
    for row in map_sides.compare_sides(study, options):
        print(row, flush=True)


def finish(out: Path, settings: dict[str, Any], title: str, rows: list[Row]) -> None:
    write(out, settings, list_rates(title, rows))
    machine = describe_machine()
    print(f"{machine['cores']} cores, {machine['device']}; written to {out}")


if __name__ == "__main__":
    run(main, outlives_reader=True, decodes=True)
