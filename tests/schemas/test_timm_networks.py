"""Test what a machine without timm says. Networks are tested where they are used."""

import sys

import pytest

from schemas.errors import UserError
from schemas.timm_networks import build_convnet


@pytest.mark.parametrize("kind", ["encoder", "backbone"])
def test_without_timm_the_message_names_the_network(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=f"{kind} timm:resnet18: timm is not installed; pip"):
        build_convnet(kind, "timm:resnet18")
