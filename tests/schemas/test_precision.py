"""The precision that `auto` stands for, by what the device computes itself."""

import pytest
import torch

from schemas.precision import autocast, pick_precision

CPU = torch.device("cpu")


@pytest.mark.parametrize("has", ["avx512_bf16", "amx_bf16"])
def test_auto_is_bf16_only_with_instructions_for_it(has, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {has: True, "avx2": True})
    assert pick_precision("auto", CPU) == "bf16"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {has: False, "avx2": True})
    assert pick_precision("auto", CPU) == "fp32"


def test_auto_on_a_gpu_does_not_accept_emulation(monkeypatch):
    for native in (True, False):
        monkeypatch.setattr(
            torch.cuda,
            "is_bf16_supported",
            lambda including_emulation=True, native=native: including_emulation or native,
        )
        expected = "bf16" if native else "fp32"
        assert pick_precision("auto", torch.device("cuda")) == expected


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", None)])
def test_a_named_precision_is_the_one_that_is_used(precision, dtype):
    assert pick_precision(precision, CPU) == precision
    with autocast(precision, CPU):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == (dtype or torch.float32)
