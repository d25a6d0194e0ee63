"""Tests of saliency maps against independent references and objects at known positions."""

import hashlib
import io
import re
from dataclasses import replace
from email.message import Message
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from precompute import demo_scenes
from precompute.estimators import ESTIMATORS, FunctionOptions, ScdaOptions, SpectralOptions
from precompute.estimators.maps import squash, standardize
from precompute.estimators.scda import find_last_map
from precompute.estimators.weights import compute_sha256, load_weights
from schemas import SaliencyMap, UserError
from tests.conftest import noise
from tests.precompute.conftest import batch
from train.encoders import build_encoder, save_encoder


def on_pixels(grid: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Resize a map to the shape of its image."""
    return np.asarray(Image.fromarray(grid).resize(shape[::-1], Image.Resampling.BILINEAR))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_maps_have_the_promised_form(name: str) -> None:
    options = ScdaOptions("resnet18", "random", size=64) if name == "scda" else SpectralOptions()
    estimator = options.build()
    images = [noise(0, 40, 90), noise(1, 200, 31), noise(2, 1, 1), noise(3, 1, 300)]
    maps = estimator(batch(*images))
    assert maps.shape == (4, estimator.side, estimator.side)
    assert maps.dtype == np.float32
    assert np.isfinite(maps).all()
    assert options.parameters()["name"] == name


@pytest.mark.parametrize(("size", "average", "sigma"), [(64, 3, 2.5), (48, 5, 1.2)])
def test_spectral_is_the_published_listing(size: int, average: int, sigma: float) -> None:
    """Compare with Hou & Zhang's listing in float64 NumPy, on a picture that needs no resizing."""
    gray = noise(0, size, size).astype(np.float64) @ [0.299, 0.587, 0.114]
    spectrum = np.fft.fft2(gray)
    log_amplitude = np.log(abs(spectrum))
    padded = np.pad(log_amplitude, average // 2, mode="edge")
    shifted = [padded[y : y + size, x : x + size] for y in range(average) for x in range(average)]
    phase = np.angle(spectrum)
    residual = log_amplitude - np.mean(shifted, axis=0)
    maps = abs(np.fft.ifft2(np.exp(residual + 1j * phase))) ** 2
    radius = round(4 * sigma)
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    kernel /= kernel.sum()
    wide = np.pad(maps, radius, mode="edge")
    rows = sum(k * wide[:, i : i + size] for i, k in enumerate(kernel))
    expected = sum(k * rows[i : i + size] for i, k in enumerate(kernel))

    options = SpectralOptions(size=size, average=average, sigma=sigma, side=size)
    found = options.build()(batch(noise(0, size, size)))[0]
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.9999
    assert np.allclose(found, expected, rtol=1e-2, atol=1e-3 * expected.max())
    small = replace(options, side=20).build()(batch(noise(0, size, size)))[0]
    resized = Image.fromarray(found).resize((20, 20), Image.Resampling.BILINEAR)  # antialiased
    assert np.allclose(small, resized, atol=1e-3 * expected.max())


def test_a_picture_is_squashed_as_pillow_does() -> None:
    """Its content has finer detail than the result can hold, which must not alias."""
    stripes = np.zeros((240, 300, 3), np.uint8)
    stripes[:, ::2] = 200
    for pixels in (noise(0, 240, 300), stripes):
        expected = Image.fromarray(pixels).resize((64, 64), Image.Resampling.BILINEAR)
        found = squash(batch(pixels), 64)[0].numpy()
        differences = abs(found - np.asarray(expected, np.float64))
        assert differences[1:-1, 1:-1].max() <= 1  # DALI repeats the border; Pillow cuts the filter


def test_each_map_is_standardized_on_its_own() -> None:
    maps = np.random.default_rng(0).normal(3, 2, (2, 3, 7, 7)) * [[[[1.0]]], [[[5.0]]]]
    maps[1, 2] = 4
    found = standardize(torch.from_numpy(maps)).numpy()
    flat = maps.reshape(6, 49)[:5]
    expected = (flat - flat.mean(axis=1, keepdims=True)) / flat.std(axis=1, keepdims=True)
    np.testing.assert_allclose(found.reshape(6, 49)[:5], expected)
    assert not found[1, 2].any()


def test_spectral_finds_the_objects_of_generated_scenes() -> None:
    """By chance, a peak hits the object in about 0.14 of the scenes, its share of the picture."""
    scenes = [demo_scenes.draw_scene(index, "train") for index in range(64)]
    maps = SpectralOptions().build()(batch(*[scene.image for scene in scenes]))
    peaks, lifts = [], []
    for scene, grid in zip(scenes, maps, strict=True):
        saliency = on_pixels(grid, scene.mask.shape)
        peaks.append(scene.mask[np.unravel_index(saliency.argmax(), saliency.shape)])
        lifts.append(saliency[scene.mask].mean() / saliency[~scene.mask].mean())
    assert np.mean(peaks) > 0.5
    assert np.median(lifts) > 3


def test_a_flat_picture_has_a_finite_map() -> None:
    flat = np.full((50, 60, 3), 128, np.uint8)
    assert np.isfinite(SpectralOptions().build()(batch(flat))).all()
    scda = ScdaOptions("resnet18", "random", size=64).build()
    assert np.isfinite(scda(batch(flat, np.zeros_like(flat)))).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "channels", "side"),
    [("resnet18", 512, 7), ("mobilenet_v2", 1280, 7), ("densenet121", 1024, 7), ("vgg11", 512, 7)],
)
def test_the_last_map_of_any_cnn(backbone: str, channels: int, side: int) -> None:
    torch.manual_seed(0)
    model = torchvision.models.get_model(backbone).eval()
    trunk = find_last_map(model, backbone)
    inputs = torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        found = trunk(inputs)["map"]
        if backbone == "resnet18":
            value = model.maxpool(model.relu(model.bn1(model.conv1(inputs))))
            expected = model.layer4(model.layer3(model.layer2(model.layer1(value))))
        elif backbone == "densenet121":
            expected = torch.relu(model.features(inputs))
        else:
            expected = model.features(inputs)
    assert found.shape == (2, channels, side, side)
    assert torch.equal(found, expected)


def test_aggregation_is_the_sum_over_channels() -> None:
    """With the whole image and the map's native side, the result is the z-scored channel sum."""
    estimator = ScdaOptions("resnet18", "random", areas=(1.0,), side=7, precision="fp32").build()
    pixels = noise(0, 224, 224)
    torch.manual_seed(0)
    model = torchvision.models.resnet18().eval()
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    inputs = torch.from_numpy(((pixels / 255.0 - mean) / std).transpose(2, 0, 1)).float()[None]
    with torch.inference_mode():
        value = model.maxpool(model.relu(model.bn1(model.conv1(inputs))))
        tensor = model.layer4(model.layer3(model.layer2(model.layer1(value))))[0].double().numpy()
    expected = tensor.sum(axis=0)
    expected = (expected - expected.mean()) / expected.std()
    assert np.allclose(estimator(batch(pixels))[0], expected, atol=1e-3)


def test_a_layer_by_name() -> None:
    estimator = ScdaOptions("resnet18", "random", layer="layer3", areas=(1.0,)).build()
    with torch.inference_mode():
        assert estimator.trunk(torch.zeros(1, 3, 224, 224))["map"].shape == (1, 256, 14, 14)
    with pytest.raises(UserError, match="no layer 'layer9'"):
        ScdaOptions("resnet18", "random", layer="layer9").build()


@pytest.mark.slow
def test_bf16_keeps_the_foreground_of_fp32(photos: Path, mobilenet_weights: Path) -> None:
    files = sorted(photos.rglob("*.JPEG"))[:8]
    images = batch(*[np.asarray(Image.open(f).convert("RGB")) for f in files])
    fronts = []
    for precision in ("bf16", "fp32"):
        options = ScdaOptions(
            "mobilenet_v2", str(mobilenet_weights), areas=(1.0,), precision=precision
        )
        maps = options.build()(images)
        fronts.append([m >= m.mean() - 0.6 * m.std() for m in maps])
    assert np.not_equal(*fronts).mean() < 0.01


def brightness(images: list[np.ndarray]) -> np.ndarray:
    """Custom estimator: the mean of the upper and of the lower half."""
    quarters = [[[i[: len(i) // 2].mean(), 0], [i[len(i) // 2 :].mean(), 0]] for i in images]
    return np.array(quarters)


def relative_brightness(images: list[np.ndarray]) -> np.ndarray:
    """Custom estimator that fails on a black image."""
    if any(image.max() == 0 for image in images):
        raise ZeroDivisionError
    return brightness(images)


def no_maps(images: list[np.ndarray]) -> np.ndarray:
    return np.zeros(len(images))


def side_of_the_image(images: list[np.ndarray]) -> np.ndarray:
    return np.stack([np.eye(len(image) // 8) for image in images])


def test_a_function_whose_side_depends_on_the_image_is_refused() -> None:
    estimator = FunctionOptions(f"{__name__}:side_of_the_image").build()
    assert estimator.side == 4
    assert estimator(batch(noise(0, 32, 90))).shape == (1, 4, 4)
    with pytest.raises(
        UserError, match=r":side_of_the_image: returned \(2, 20, 20\) .* not \(2, 4, 4\)"
    ):
        estimator(batch(noise(0, 160, 90), noise(1, 160, 200)))


def test_a_function_of_ones_own() -> None:
    estimator = FunctionOptions(f"{__name__}:brightness").build()
    images = [noise(0), noise(1, 30, 90)]
    assert estimator.side == 2
    assert np.allclose(estimator(batch(*images)), brightness(images))
    assert len(estimator.weights_sha256) == 64
    assert FunctionOptions(f"{__name__}:relative_brightness").build().side == 2
    for path, message in {
        f"{__name__}:absent": f"{__name__} defines no absent",
        "absent_module:f": "No module named 'absent_module'",
        f"{__name__}:no_maps": r"returned \(1,\) for 1 images",
    }.items():
        with pytest.raises(UserError, match=message):
            FunctionOptions(path).build()


def test_random_weights_are_the_same_in_every_worker() -> None:
    first, second = (ScdaOptions("resnet18", "random", size=64).build() for _ in range(2))
    assert first.weights_sha256 == second.weights_sha256
    assert (first(batch(noise(0))) == second(batch(noise(0)))).all()


def test_the_digest_of_weights_is_that_of_names_and_values() -> None:
    """Datasets store it and are only extended under the same one."""
    first, second = np.arange(6, dtype=np.float32).reshape(2, 3), np.array([7], np.int64)
    state = {"b": torch.from_numpy(second), "a": torch.from_numpy(first.T.copy()).T}
    expected = hashlib.sha256(b"a" + first.tobytes() + b"b" + second.tobytes())
    assert compute_sha256(state) == expected.hexdigest()


def test_a_download_of_other_weights_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has a network's names and shapes, and not the digest in torchvision's name of the file."""
    content = io.BytesIO()
    model = torchvision.models.resnet18()
    torch.save(model.state_dict(), content)

    def serve(request: object) -> io.BytesIO:
        answer = io.BytesIO(content.getvalue())
        answer.info = Message  # type: ignore[attr-defined]
        return answer

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "urlopen", serve)
    with pytest.raises(UserError, match=r"could not be downloaded .*invalid hash"):
        load_weights(model, model, "resnet18", "IMAGENET1K_V1")
    assert not list(tmp_path.rglob("*.pth"))


@pytest.mark.slow
def test_weights_may_lack_the_classifier_but_nothing_else(tmp_path: Path) -> None:
    model = torchvision.models.get_model("resnet18")
    state = model.state_dict()
    path = tmp_path / "encoder.pt"

    def load(content: object) -> str:
        torch.save(content, path)
        other = torchvision.models.get_model("resnet18").eval()
        trunk = find_last_map(other, "resnet18")
        load_weights(trunk, other, "resnet18", str(path))
        return compute_sha256(trunk.state_dict())

    headless = {key: value for key, value in state.items() if not key.startswith("fc.")}
    assert load(state) == load(headless)
    with pytest.raises(UserError, match=r"lacks conv1\.weight"):
        load({key: value for key, value in state.items() if key != "conv1.weight"})
    assert load(state | {"extra": torch.zeros(1)}) == load(state)
    with pytest.raises(UserError, match=r"has unknown layer1\.2\.conv1\.weight"):
        load(state | {"layer1.2.conv1.weight": torch.zeros(1)})
    with pytest.raises(UserError, match=r"has other shapes: conv1\.weight"):
        load(state | {"conv1.weight": torch.zeros(64, 3, 3, 3)})
    with pytest.raises(UserError, match="not a state_dict"):
        load([1, 2])
    path.write_bytes(b"no weights")
    with pytest.raises(UserError, match="not a readable state_dict"):
        load_weights(model, model, "resnet18", str(path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (ScdaOptions("resnet5"), "did you mean resnet50"),
        (ScdaOptions("resnet18", "IMAGENET1K_V9"), "did you mean IMAGENET1K_V1"),
        (ScdaOptions("resnet18", "absent.pt"), "absent.pt: no such weights file"),
        (ScdaOptions("vit_b_16", "random"), "choose a CNN"),
        (
            ScdaOptions("timm:test_vit", "random"),
            r"has attention layers \(Attention\); choose a Con",
        ),
        (ScdaOptions("timm:test_convnextt", "random"), "did you mean timm:test_convnext"),
        (ScdaOptions("timm:test_convnext", "IMAGENET1K_V1"), "give DEFAULT, random or the path"),
    ],
)
def test_wrong_options_are_one_clear_line(options: ScdaOptions, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        options.build()
    assert "\n" not in str(raised.value)


def test_options_without_sense_are_refused() -> None:
    with pytest.raises(UserError, match="at least one area"):
        ScdaOptions(areas=())
    with pytest.raises(UserError, match="above 0, at most 1"):
        ScdaOptions(areas=(0.5, 0.0))
    with pytest.raises(UserError, match="side: must be 1 cell or more"):
        ScdaOptions(side=0)
    with pytest.raises(UserError, match="average: must be odd"):
        SpectralOptions(average=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["scda", "spectral"])
def test_eight_bits_keep_the_foreground_of_real_maps(
    name: str, photos: Path, mobilenet_weights: Path
) -> None:
    options = (
        ScdaOptions("mobilenet_v2", str(mobilenet_weights), areas=(1.0,))
        if name == "scda"
        else SpectralOptions()
    )
    files = sorted(photos.rglob("*.JPEG"))[:32]
    maps = options.build()(batch(*[np.asarray(Image.open(f).convert("RGB")) for f in files]))

    def foreground(grid: np.ndarray) -> np.ndarray:
        return grid >= grid.mean(dtype=np.float64) - 0.6 * grid.std(dtype=np.float64)

    kept = [(foreground(SaliencyMap.quantize(m).values()) == foreground(m)).mean() for m in maps]
    assert np.mean(kept) >= 0.99


def test_the_documented_function_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[2] / "docs" / "saliency.md").read_text()
    *_, code = re.findall(r"```python\n(.*?)```", text, re.S)
    (tmp_path / "documented_maps.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    estimator = FunctionOptions("documented_maps:center").build()
    (grid,) = estimator(batch(noise(0)))
    assert grid.shape == (28, 28)
    assert grid[14, 14] > grid[0, 0]


def test_an_encoder_that_train_wrote_can_guide_its_successor(tmp_path: Path) -> None:
    torch.manual_seed(1)
    encoder, _ = build_encoder("resnet18")
    save_encoder(tmp_path / "encoder.safetensors", encoder, {"encoder": "resnet18"})
    options = ScdaOptions("resnet18", str(tmp_path / "encoder.safetensors"), precision="fp32")
    estimator = options.build()
    assert torch.equal(estimator.trunk.conv1.weight, encoder.conv1.weight)
    assert estimator.weights_sha256 != ScdaOptions("resnet18", "random").build().weights_sha256


def test_a_timm_backbone_gives_the_summed_map_that_timm_computes(tmp_path: Path) -> None:
    """The weights are those of an encoder that `train` wrote, which has no classifier."""
    encoder, _ = build_encoder("timm:test_convnext")
    save_encoder(tmp_path / "encoder.safetensors", encoder, {"encoder": "timm:test_convnext"})
    weights = str(tmp_path / "encoder.safetensors")
    estimator = ScdaOptions(
        "timm:test_convnext", weights, areas=(1.0,), side=7, precision="fp32"
    ).build()
    pixels = torch.tensor(noise(0, 224, 224))[None]
    found = estimator.aggregate(pixels)  # type: ignore[attr-defined]
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    image = ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = encoder.eval().forward_features(image).sum(1)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)
