"""Custom masks and fills: the example in docs/pipeline.md works as printed."""

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pipeline import MaskedViews, Recipe, fills, masks
from schemas import ShardDataset, UserError
from tests.forked import run_forked
from tests.pipeline.conftest import CROP, small

DOCS = Path(__file__).parents[2] / "docs" / "pipeline.md"


def blocks(language: str) -> list[str]:
    """Return the code blocks of one language in the documentation, in order."""
    return re.findall(rf"```{language}\n(.*?)```", DOCS.read_text(), re.DOTALL)


def first(dataset: ShardDataset, recipe: Recipe):
    return next(iter(MaskedViews(dataset.url, recipe, 8, "cpu", report=("masks",))))


def test_the_documented_mask_and_fill_work(dataset: ShardDataset) -> None:
    try:
        exec(blocks("python")[0], {})
        batch = first(dataset, small("mean", query_mask="border", fill="stripes"))
    finally:
        masks.MASKS.pop("border", None)
        fills.FILLS.pop("stripes", None)
    mask = batch.query_mask
    assert mask is not None
    cell = CROP // 7
    inner = slice(cell, -cell)
    assert not mask[:, :, inner, inner].any()
    assert mask.float().mean().item() == pytest.approx(24 / 49)
    rows = (torch.arange(CROP) // 4 % 2).float().view(1, 1, -1, 1).expand_as(batch.query)
    assert torch.equal(batch.query[mask], rows[mask])


@pytest.fixture
def registered(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    masks.MASKS.pop("own", None)
    fills.FILLS.pop("own", None)


@pytest.mark.usefixtures("registered")
def test_a_mask_that_works_in_place_changes_no_other(dataset: ShardDataset) -> None:
    @masks.mask("own")
    def own(saliency, ratio, recipe, rng):
        ratio.zero_()
        return saliency.zero_().bool()

    # the masks of a key and of its hard negative get the same saliency
    usual, other = (
        first(dataset, small("mean", branch="key", query_mask=name)) for name in ("spread", "own")
    )
    assert not other.key_mask.any()
    assert torch.equal(usual.key_ratio, other.key_ratio)
    assert torch.equal(usual.hard_negative_mask, other.hard_negative_mask)


@pytest.mark.usefixtures("registered")
def test_a_fill_in_float64_that_works_in_place(dataset: ShardDataset) -> None:
    @fills.fill("own")
    def own(image, recipe, std, rng):
        image.zero_()
        return rng.uniform(len(image), 3, 1, 1) + 10  # no view has such values

    batch = first(dataset, small("mean", fill="own", hard_negatives=0))
    assert batch.query_mask is not None
    assert batch.query_mask.any()
    assert torch.equal(batch.query >= 10, batch.query_mask)
    plain = first(dataset, small("mean", hard_negatives=0))
    assert torch.equal(batch.key, plain.key)
    assert torch.equal(batch.query[~batch.query_mask], plain.query[~batch.query_mask])


def test_a_function_that_changed_since_the_state_is_refused(
    dataset: ShardDataset, tmp_path: Path
) -> None:
    code = "def own(image, recipe, std, rng):\n    return image * 0 + {}\n"
    states = []
    for name, value in (("a", 1), ("b", 1), ("c", 2)):
        file = tmp_path / name / "own.py"
        file.parent.mkdir()
        file.write_text(code.format(value))
        views = MaskedViews(dataset.url, small("mean", fill=f"{file}:own"), 8, "cpu")
        states.append(views.state_dict())
    same, changed = states[1]["fingerprint"], states[2]["fingerprint"]
    path = states[0]["fingerprint"]["recipe"]["fill"]
    for fingerprint in (same, changed):
        fingerprint["recipe"]["fill"] = path  # as if the one file had been edited
    views = MaskedViews(dataset.url, small("mean", fill=path), 8, "cpu")
    views.load_state_dict(states[1])
    with pytest.raises(UserError, match=r"code\.fill was \w+, is \w+$"):
        views.load_state_dict(states[2])
    del changed["code.fill"]  # an older state does not have it
    views.load_state_dict(states[2])


def test_a_file_that_changed_since_it_was_loaded_is_refused(
    dataset: ShardDataset, tmp_path: Path
) -> None:
    """Its old function would run, under the digest of the new one."""
    file = tmp_path / "own.py"
    recipe = small("mean", fill=f"{file}:own")
    file.write_text("def own(image, recipe, std, rng):\n    return image * 0\n")
    views = MaskedViews(dataset.url, recipe, 8, "cpu")
    state = views.state_dict()
    file.write_text("def own(image, recipe, std, rng):\n    return image * 0 + 1\n")
    with pytest.raises(UserError, match=r"own\.py:own': the file has changed .* restart Python"):
        MaskedViews(dataset.url, recipe, 8, "cpu")
    next(iter(views))  # what was loaded goes on
    assert views.state_dict()["fingerprint"] == state["fingerprint"]


@pytest.mark.usefixtures("registered")
def test_a_loader_goes_on_after_an_error_of_a_function(dataset: ShardDataset) -> None:
    calls = []

    @fills.fill("own")
    def own(image, recipe, std, rng):
        calls.append(len(image))
        if len(calls) == 1:
            raise ValueError("once")
        return image * 0

    views = MaskedViews(dataset.url, small("mean", fill="own"), 8, "cpu", report=("keys",))
    with pytest.raises(ValueError, match="once"):
        next(iter(views))
    first_keys = next(batch.sample_keys for batch in views)
    plain = MaskedViews(dataset.url, small("mean"), 8, "cpu", report=("keys",))
    assert first_keys == next(iter(plain)).sample_keys


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.uint8])
def test_a_mask_that_is_not_bool(dataset: ShardDataset, dtype: torch.dtype) -> None:
    @masks.mask("own")
    def own(saliency, ratio, recipe, rng):
        cells = torch.zeros(saliency.shape, dtype=dtype)
        cells[:, 1:3, 2] = 1
        return cells

    batch = first(dataset, small("mean", query_mask="own"))
    plain = first(dataset, small("none"))
    cell = CROP // 7
    expected = torch.zeros(CROP, CROP, dtype=torch.bool)
    expected[cell : 3 * cell, 2 * cell : 3 * cell] = True
    assert torch.equal((batch.query != plain.query).any(1).any(0), expected)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("shape", [(8, 5, 7), (8, 7, 5), (8, 7), (4, 7, 7), (8, 0, 7)])
def test_a_mask_of_a_wrong_shape_is_named(dataset: ShardDataset, shape: tuple) -> None:
    @masks.mask("own")
    def own(saliency, ratio, recipe, rng):
        return torch.ones(shape, dtype=torch.bool)

    with pytest.raises(UserError, match=r"mask 'own': it returned cells of shape .*h and w divide"):
        first(dataset, small("mean", query_mask="own"))


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("shape", [(8, 3, 5, 5), (4, 3, 1, 1), (1, 8, 3, 1, 1)])
def test_a_fill_of_a_wrong_shape_is_named(dataset: ShardDataset, shape: tuple) -> None:
    @fills.fill("own")
    def own(image, recipe, std, rng):
        return torch.ones(shape)

    with pytest.raises(
        UserError, match=r"fill 'own': it returned content of shape .*broadcastable"
    ):
        first(dataset, small("mean", fill="own"))


@pytest.mark.slow
def test_the_documented_command_works(dataset: ShardDataset, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(blocks("python")[0])
    command = blocks("sh")[0].replace("out/photos", dataset.url).replace("\\\n", " ")
    assert command.startswith("saliency-pipeline preview")
    out = tmp_path / "sheet.png"
    arguments = shlex.split(command)[1:]
    program = "import runpy; runpy.run_module('pipeline', run_name='__main__', alter_sys=True)"
    more = ["--out", str(out), "--crop-size", "56"]
    done = run_forked(program, [*arguments, *more], tmp_path)
    assert done.returncode == 0, done.stderr
    assert out.exists()


def test_a_module_on_the_path_is_imported(
    dataset: ShardDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_masks.py").write_text(
        "import torch\n"
        "def left(saliency, ratio, recipe, rng):\n"
        "    pixels = torch.zeros(len(ratio), 1, recipe.crop_size, dtype=torch.bool)\n"
        "    pixels[:, :, : recipe.crop_size // 2] = True\n"
        "    return pixels\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    batch = first(dataset, small("mean", query_mask="my_masks:left"))
    sys.modules.pop("my_masks")
    assert batch.query_mask is not None
    assert batch.query_mask[..., : CROP // 2].all()
    assert not batch.query_mask[..., CROP // 2 :].any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fill": "nois"}, "unknown fill 'nois': did you mean noise"),
        ({"query_mask": "spred"}, "unknown mask 'spred': did you mean spread"),
        ({"hard_negative_mask": "no_such_module:left"}, "No module named 'no_such_module'"),
        ({"fill": "math:no_such_fill"}, "no_such_fill"),
    ],
)
def test_an_unknown_name_is_refused_before_anything_is_read(
    dataset: ShardDataset, changes: dict[str, str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        MaskedViews(dataset.url, small("mean", **changes), 8, "cpu")


@pytest.mark.parametrize("name", ["spread", "none", "file.py:mask"])
def test_a_name_that_cannot_be_registered_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"mask '{name}': choose a name that is not registered"):
        masks.mask(name)(masks.mask_evenly)
