"""Tests of decoding: a shard gets only images that DALI reads, re-encoded if necessary."""

import io
import zlib

import numpy as np
import nvidia.dali.experimental.dynamic as ndd
import pytest
import torch
from PIL import Image, ImageOps

from precompute import decode as decode_module
from precompute.decode import decode
from precompute.reencode import EncodedImage, RejectedError, Resize
from precompute.reencode import check as check_whole
from precompute.sources import SourceImage
from schemas import UserError
from schemas.device_errors import classify_error
from tests.conftest import encode, noise

KEEP = Resize()
PIXELS = noise(0, height=37, width=53)
IMAGE = Image.fromarray(PIXELS)
SIXTEEN_BIT = Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257)


def saved(image: Image.Image, image_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def oriented(orientation: int, image_format: str = "JPEG") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(IMAGE, image_format, exif=exif)


def check(image: SourceImage, content: bytes, resize: Resize = KEEP) -> EncodedImage:
    return check_whole(image, content, {}, resize)


def ycck() -> bytes:
    """Return a CMYK JPEG whose Adobe marker says that its colors are YCCK."""
    content = bytearray(saved(IMAGE.convert("CMYK"), "JPEG"))
    content[content.index(b"Adobe") + 11] = 2
    return bytes(content)


def animated(image_format: str) -> bytes:
    return saved(IMAGE, image_format, save_all=True, append_images=[IMAGE.rotate(90)])


def read(content: bytes) -> tuple[str, bool, np.ndarray]:
    """Return the extension, whether it was re-encoded, and the pixels. Raises RejectedError."""
    encoded = check(SourceImage("key", "a/b.jpg", 0), content)
    good, pixels, rejects = decode([encoded])
    if rejects:
        raise RejectedError(encoded.image, *rejects[0][1:])
    return good[0].extension, good[0].reencoded, np.asarray(pixels.tensors[0].cpu())


def by_pillow(content: bytes) -> np.ndarray:
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB"))


@pytest.mark.parametrize(
    ("content", "extension"),
    [
        pytest.param(saved(IMAGE, "JPEG"), "jpg", id="jpeg"),
        pytest.param(saved(IMAGE, "JPEG", progressive=True), "jpg", id="progressive"),
        pytest.param(saved(IMAGE.convert("L"), "JPEG"), "jpg", id="gray"),
        pytest.param(saved(IMAGE.convert("CMYK"), "JPEG"), "jpg", id="cmyk"),
        pytest.param(ycck(), "jpg", id="ycck"),
        pytest.param(animated("WEBP"), "webp", id="animated webp"),
        pytest.param(animated("PNG"), "png", id="animated png"),
        pytest.param(saved(IMAGE.convert("RGBA"), "PNG"), "png", id="alpha"),
        pytest.param(saved(IMAGE.convert("P"), "PNG"), "png", id="palette"),
        pytest.param(saved(IMAGE.convert("1"), "PNG"), "png", id="one bit"),
        pytest.param(saved(IMAGE, "WEBP"), "webp", id="webp"),
        pytest.param(saved(IMAGE, "BMP"), "bmp", id="bmp"),
        pytest.param(saved(IMAGE, "TIFF"), "tiff", id="tiff"),
        pytest.param(saved(IMAGE, "PPM"), "pnm", id="ppm"),
        pytest.param(saved(IMAGE.resize((1, 1)), "JPEG"), "jpg", id="one pixel"),
        pytest.param(saved(IMAGE.resize((1, 500)), "PNG"), "png", id="one pixel wide"),
        *[pytest.param(oriented(n), "jpg", id=f"orientation {n}") for n in range(1, 9)],
        pytest.param(oriented(6, "PNG"), "png", id="oriented png"),
        pytest.param(oriented(6, "WEBP"), "webp", id="oriented webp"),
    ],
)
def test_what_dali_reads_is_kept_as_it_is(content: bytes, extension: str) -> None:
    found, reencoded, pixels = read(content)
    assert (found, reencoded) == (extension, False)
    expected = by_pillow(content)
    assert pixels.shape == expected.shape
    assert abs(pixels.astype(int) - expected).mean() < 1


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    _, _, pixels = read(saved(SIXTEEN_BIT, "PNG"))
    assert abs(pixels[..., 0].astype(int) - PIXELS[..., 0]).max() <= 1


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(saved(IMAGE.convert("P"), "GIF"), id="gif"),
        pytest.param(animated("GIF"), id="animated gif"),
        pytest.param(saved(IMAGE, "TGA"), id="tga"),
        pytest.param(saved(IMAGE, "TIFF", compression="lzma"), id="a tiff that DALI does not know"),
    ],
)
def test_what_dali_does_not_read_is_reencoded_without_loss(content: bytes) -> None:
    extension, reencoded, pixels = read(content)
    assert (extension, reencoded) == ("png", True)
    assert (pixels == by_pillow(content)).all()


# noise, so that most of the bytes encode pixels and a cut damages them
JPEG = encode(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        pytest.param(b"", "empty", id="empty"),
        pytest.param(b"a line of text\n" * 99, "not-an-image", id="text"),
        pytest.param(bytes(range(256)), "not-an-image", id="garbage"),
        pytest.param(JPEG[:20], "not-an-image", id="a jpeg's first bytes"),
        pytest.param(JPEG[:100], "undecodable", id="half a jpeg's header"),
        pytest.param(JPEG[: len(JPEG) // 2], "undecodable", id="half a jpeg"),
        pytest.param(JPEG[:-2], "undecodable", id="a jpeg without its end marker"),
        pytest.param(saved(IMAGE, "PNG")[:-30], "undecodable", id="a png cut short"),
        pytest.param(saved(IMAGE, "WEBP")[:-30], "undecodable", id="a webp cut short"),
        pytest.param(saved(IMAGE.convert("P"), "GIF")[:-300], "undecodable", id="half a gif"),
    ],
)
def test_what_cannot_be_read_is_rejected_with_a_reason(content: bytes, reason: str) -> None:
    with pytest.raises(RejectedError) as raised:
        read(content)
    assert raised.value.reject.source == "a/b.jpg"
    assert raised.value.reject.reason == reason
    assert "\n" not in raised.value.reject.detail


def test_a_decompression_bomb_is_rejected_by_its_header() -> None:
    """Return a PNG of a few bytes whose header claims 30,000 x 30,000 pixels."""
    png = bytearray(encode(np.zeros((8, 8, 3), np.uint8), "PNG"))
    png[16:24] = (30000).to_bytes(4, "big") * 2
    png[29:33] = zlib.crc32(png[12:29]).to_bytes(4, "big")
    with pytest.raises(RejectedError) as raised:
        read(bytes(png))
    assert raised.value.reject.reason == "too-large"


def test_one_bad_image_does_not_cost_its_batch() -> None:
    contents = [JPEG, JPEG[: len(JPEG) // 2], saved(IMAGE, "PNG")]
    encoded = [check(SourceImage(f"k{i}", f"{i}", 0), c) for i, c in enumerate(contents)]
    good, pixels, rejects = decode(encoded)
    assert [one.image.key for one in good] == ["k0", "k2"]
    assert [reject.source for reject in rejects] == ["1"]
    assert len(pixels.tensors) == 2


ILLEGAL = "CUDA runtime API error cudaErrorIllegalAddress (700):\nan illegal memory access"
SOUND = [check(SourceImage(f"k{i}", f"{i}", 0), JPEG) for i in range(3)]


class BreakingDecoder:
    """Fake for DALI's decoder: after `first` calls, every decode fails with `error`."""

    def __init__(self, first: int, error: Exception):
        self.first, self.error, self.calls = first, error, 0
        self.decode_batch = decode_module.decode_batch

    def __call__(self, images: list[EncodedImage]) -> object:
        self.calls += 1
        if self.calls > self.first:
            raise self.error
        return self.decode_batch(images)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            RuntimeError(ILLEGAL),
            r"the decoder fails \(CUDA runtime API error cudaErrorIllegalAddress",
        ),
        (RuntimeError("CUDA allocation failed"), "the decoder fails, out of memory"),
        (RuntimeError("Can't allocate 9 bytes on device 0."), "the decoder fails, out of memory"),
        (MemoryError(), "the decoder fails, out of memory"),
        (RuntimeError("Failed to decode sample #0 :"), "known to be good does not decode"),
        (SystemError("not one image's"), "known to be good does not decode"),
    ],
)
def test_a_decoder_that_fails_rejects_no_image(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_module, "decode_batch", BreakingDecoder(0, error))
    with pytest.raises(UserError, match=said) as raised:
        decode(SOUND)
    assert "no image is rejected" in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("first", range(2, 8))
def test_a_decoder_that_fails_behind_a_damaged_image_rejects_no_sound_one(
    first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first batch fails because of its image; the decoder then fails during the search."""
    damaged = check(SourceImage("bad", "bad", 0), JPEG[: len(JPEG) // 2])
    breaking = BreakingDecoder(first, RuntimeError("Failed to decode sample #0 :"))
    monkeypatch.setattr(decode_module, "decode_batch", breaking)
    with pytest.raises(UserError, match="no image is rejected"):
        decode([damaged, *SOUND])
    assert breaking.calls > first


@pytest.mark.parametrize("error", [RuntimeError("cut"), ValueError("EXIF"), OverflowError("size")])
def test_whatever_one_image_raises_is_its_own_reject(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode_batch = decode_module.decode_batch

    def fail_on_png(images: list[EncodedImage]) -> object:
        if any(image.image.key in ("gif", "png") for image in images):
            raise error
        return decode_batch(images)

    def make(image_format: str) -> EncodedImage:
        content = saved(IMAGE.convert("P"), image_format)
        return check(SourceImage(image_format.lower(), image_format, 0), content)

    monkeypatch.setattr(decode_module, "decode_batch", fail_on_png)
    good, _, rejects = decode([*SOUND, make("PNG"), make("GIF")])
    assert good == SOUND
    assert [reject.source for reject in rejects] == ["PNG", "GIF"]
    assert {reject.reason for reject in rejects} == {"undecodable"}


@pytest.mark.gpu
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000"])
def test_formats_decode_on_a_gpu_as_on_a_cpu(image_format: str) -> None:
    # color at full resolution: nvJPEG enlarges halved color by repeating it, libjpeg smoothly
    options = {"subsampling": 0} if image_format == "JPEG" else {}
    encoded = check(SourceImage("key", "a", 0), saved(IMAGE, image_format, **options))
    on_gpu = np.asarray(decode_module.decode_batch([encoded]).tensors[0].cpu())
    on_cpu = by_pillow(encoded.content)
    assert on_gpu.shape == on_cpu.shape
    # nvJPEG implements the inverse DCT differently
    assert abs(on_gpu.astype(int) - on_cpu).mean() < 2


@pytest.mark.gpu
def test_memory_that_runs_out_is_said_in_words_that_are_known() -> None:
    """The messages of real out-of-memory errors of PyTorch and DALI are classified as memory."""
    too_much = 2 * torch.cuda.get_device_properties(0).total_memory
    with pytest.raises(RuntimeError) as by_torch:
        torch.empty(too_much, dtype=torch.uint8, device="cuda")
    assert classify_error(str(by_torch.value)) == "memory"
    one = ndd.as_tensor(np.zeros((1, 1, 3), np.uint8)).gpu()
    side = int((too_much / 3) ** 0.5)
    with pytest.raises((RuntimeError, MemoryError)) as by_dali:
        ndd.resize(one, size=[side, side]).evaluate()
    assert classify_error(str(by_dali.value)) == "memory" or by_dali.type is MemoryError


@pytest.mark.parametrize(
    ("resize", "content"), [(Resize(16), saved(IMAGE, "PNG")), (KEEP, saved(IMAGE, "GIF"))]
)
def test_memory_that_runs_out_in_pillow_rejects_no_image(
    resize: Resize, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(picture: Image.Image) -> Image.Image:
        raise MemoryError

    monkeypatch.setattr(ImageOps, "exif_transpose", fail)
    with pytest.raises(UserError, match=r"^a/b.jpg: Pillow does not decode it, out of memory \("):
        check(SourceImage("key", "a/b.jpg", 0), content, resize)
