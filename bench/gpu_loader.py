"""Checks of the loader on a device, each against a result that does not depend on the device.

`bench.gpu_session` runs them on a GPU (and on a CPU, so that they keep working);
`tests/pipeline/test_loader_gpu.py` runs them as tests. They need only the packages of `pipeline`.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pipeline import Batch, MaskedViews, get_recipe
from pipeline.batch import EXTRAS, Extra
from pipeline.loader import DecodeOn
from pipeline.photometric import Photometric
from schemas import Sample, write_dataset
from schemas.sample import IMAGE_EXTENSIONS

FORMATS = IMAGE_EXTENSIONS
"""Every format that precompute keeps without re-encoding, and its extension."""

DECODERS_DIFFER = 3.0
"""Allowed mean difference of two decoders' pixels, of 255 (our choice; a wrong image has 50)."""

SLEEP_CYCLES = 200_000_000
"""About a tenth of a second on a GPU."""


def write_photos(folder: Path, count: int, formats: tuple[str, ...] = tuple(FORMATS)) -> str:
    """Write a dataset of smooth random pictures that cycles through the formats; return its URL."""

    def samples() -> Iterator[Sample]:
        rng = np.random.default_rng(0)
        for number in range(count):
            kind = formats[number % len(formats)]
            coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
            buffer = io.BytesIO()
            coarse.resize((160, 120), Image.Resampling.BICUBIC).save(buffer, kind)
            yield Sample(
                key=f"{kind}-{number:04d}",
                image=buffer.getvalue(),
                extension=FORMATS[kind],
                saliency=rng.random((28, 28), dtype=np.float32),
                label=number % 2,
                height=120,
                width=160,
            )

    return write_dataset(folder, samples(), name="check", classes=["a", "b"]).url


def views_of(
    url: str,
    device: str,
    batch_size: int,
    side: int,
    decode_on: DecodeOn = "gpu",
    extras: Sequence[Extra] = EXTRAS,
) -> MaskedViews:
    recipe = replace(get_recipe("hp"), crop_size=side)
    return MaskedViews(
        url, recipe, batch_size, device=device, seed=3, report=extras, decode_on=decode_on
    )


def take(views: MaskedViews, count: int) -> list[Batch]:
    """Return the next `count` batches, over as many epochs as it takes."""
    batches: list[Batch] = []
    while len(batches) < count:
        for batch in views:
            batches.append(batch)
            if len(batches) == count:
                break
    return batches


def take_and_close(views: MaskedViews, count: int) -> list[Batch]:
    """Return the next `count` batches and close the loader."""
    with closing(views):
        return take(views, count)


def differences(
    first_batch: Batch, second_batch: Batch, leave_out: tuple[str, ...] = ()
) -> list[str]:
    """Return the names of the fields whose values are not equal bit for bit."""
    names = []
    for name in (field.name for field in fields(first_batch) if field.name not in leave_out):
        first, second = getattr(first_batch, name), getattr(second_batch, name)
        if isinstance(first, torch.Tensor):
            is_equal = torch.equal(first.cpu(), second.cpu())
        elif isinstance(first, Photometric):
            pairs = zip(vars(first).values(), vars(second).values(), strict=True)
            is_equal = all(torch.equal(a.cpu(), b.cpu()) for a, b in pairs)
        else:
            is_equal = first == second
        if not is_equal:
            names.append(name)
    return names


def expect_equal(
    first_batches: list[Batch], second_batches: list[Batch], leave_out: tuple[str, ...] = ()
) -> None:
    for step, (first, second) in enumerate(zip(first_batches, second_batches, strict=True)):
        if differ := differences(first, second, leave_out):
            raise AssertionError(f"step {step} differs in {', '.join(differ)}")


def check_repeats(url: str, device: str, batch_size: int, side: int) -> str:
    """Check that two loaders with the same seed give the same bits."""
    first, second = (take_and_close(views_of(url, device, batch_size, side), 3) for _ in range(2))
    expect_equal(first, second)
    return "3 batches equal bit for bit"


def check_resumes(url: str, device: str, batch_size: int, side: int) -> str:
    """Check that a loader resumes from the state of another."""
    expected = take_and_close(views_of(url, device, batch_size, side), 3)
    started = views_of(url, device, batch_size, side)
    take_and_close(started, 1)
    resumed = views_of(url, device, batch_size, side)
    resumed.load_state_dict(started.state_dict())
    expect_equal(take_and_close(resumed, 2), expected[1:])
    return "2 batches after a resume equal bit for bit"


def check_nothing_overwritten(url: str, device: str, batch_size: int, side: int) -> str:
    """Check that the decoder does not reuse the memory of crops before the device has read them."""
    runs: list[list[Batch]] = []
    for is_late in (False, True):
        # no extras: some are copied to the host, which waits
        with closing(views_of(url, device, batch_size, side, extras=())) as views:
            batches = take(views, 1)  # starts the decoder, and compiles
            if is_late and device == "cuda":
                torch.cuda._sleep(SLEEP_CYCLES)  # delays the kernels that read the next crops
            runs.append(batches + take(views, 4))
    expect_equal(runs[0], runs[1])
    return "4 batches whose crops are read late equal those read at once"


def check_equals_cpu(
    url: str, device: str, batch_size: int, side: int, decode_on: DecodeOn = "gpu"
) -> str:
    """Check that draws, windows, masks and jitter equal the CPU's, and pixels up to the decoder."""
    on_device, on_cpu = (
        take_and_close(views_of(url, name, batch_size, side, decode_on), 2)
        for name in (device, "cpu")
    )
    pixels = ("query", "key", "hard_negative", "query_crop", "key_crop")
    expect_equal(on_device, on_cpu, leave_out=pixels)
    crops = [
        (gpu_batch.query_crop.cpu().float() - cpu_batch.query_crop.float()).abs().mean().item()
        for gpu_batch, cpu_batch in zip(on_device, on_cpu, strict=True)
        if gpu_batch.query_crop is not None and cpu_batch.query_crop is not None
    ]
    if max(crops) > DECODERS_DIFFER:
        raise AssertionError(f"crops differ by {max(crops):.2f} of 255 on average")
    return f"draws and masks equal; crops differ by {max(crops):.2f} of 255 on average"


def check_formats(url: str, device: str, batch_size: int, side: int) -> str:
    """Check that each format decodes as on the CPU; `url` is a dataset of `write_photos`."""
    worst: dict[str, float] = {}
    pair = (views_of(url, name, batch_size, side) for name in (device, "cpu"))
    device_batches, cpu_batches = (take_and_close(views, len(views)) for views in pair)
    for first, second in zip(device_batches, cpu_batches, strict=True):
        assert first.query_crop is not None
        assert second.query_crop is not None
        apart = (first.query_crop.cpu().float() - second.query_crop.float()).abs()
        for key, value in zip(first.sample_keys or [], apart.mean((1, 2, 3)).tolist(), strict=True):
            kind = key.split("-")[0]
            worst[kind] = max(value, worst.get(kind, 0.0))
    if missing := set(FORMATS) - set(worst):
        raise AssertionError(f"no image of {', '.join(sorted(missing))} was seen")
    text = ", ".join(f"{kind} {value:.2f}" for kind, value in sorted(worst.items()))
    if max(worst.values()) > DECODERS_DIFFER:
        raise AssertionError(f"mean difference of pixels from the CPU's, of 255: {text}")
    return f"mean difference of pixels from the CPU's, of 255: {text}"


def check_no_waits(url: str, device: str, batch_size: int, side: int) -> str | None:
    """Check that the host does not wait for the GPU while it makes batches; None without a GPU."""
    if device != "cuda":
        return None
    # no extras: they are for inspection, and some are copied to the host
    views = views_of(url, device, batch_size, side, extras=())
    stream = iter(views)
    next(stream)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        next(stream)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        views.close()
    return "no wait in a batch, by torch's sync debug mode"


CHECKS: dict[str, Callable[[str, str, int, int], str | None]] = {
    "repeats": check_repeats,
    "resumes": check_resumes,
    "nothing overwritten": check_nothing_overwritten,
    "equals the CPU": check_equals_cpu,
    "decodes on the CPU": partial(check_equals_cpu, decode_on="cpu"),
    "formats": check_formats,
    "no waits": check_no_waits,
}
"""Checks by name; each raises AssertionError on failure, else returns its figures or None.

None means that the check cannot run here.
"""
