"""The photos of a benchmark."""

from pathlib import Path

import pytest

from bench.photos import list_photos
from schemas import UserError
from tests.conftest import encode, noise


def test_photos_are_listed_and_a_folder_without_any_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no images in it"):
        list_photos(str(tmp_path))
    (tmp_path / "ant").mkdir()
    content = encode(noise(0, 40, 40), "JPEG")
    (tmp_path / "ant" / "0.jpg").write_bytes(content)
    source, [image] = list_photos(str(tmp_path))
    assert source.read(image) == content
