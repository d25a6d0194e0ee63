"""Functions that are compiled for a GPU; here PyTorch traces them, but does not generate code."""

from functools import partial

import pytest
import torch

from pipeline import compiling
from pipeline.compiling import Compiled


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Compiled:
    monkeypatch.setattr(compiling, "is_compilable", lambda _: True)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()  # variants are counted for each piece of code, here that of the lambda
    return Compiled(lambda x: x + 1)


@pytest.mark.parametrize("has_own_limit", [True, False])
def test_there_may_be_more_variants_than_pytorchs_default(
    compiled: Compiled, has_own_limit: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if has_own_limit and not compiling.takes_recompile_limit():
        pytest.skip("this version of PyTorch has no limit for each function")
    monkeypatch.setattr(compiling, "takes_recompile_limit", lambda: has_own_limit)
    default = 3
    # set here, because importing timm's optimizers raises it for the whole process
    with torch._dynamo.config.patch(recompile_limit=default):
        for size in range(1, default + 5):
            assert torch.equal(compiled.try_call(torch.zeros(size)), torch.ones(size))
        assert torch._dynamo.config.recompile_limit == default


def test_a_function_with_too_many_variants_runs_uncompiled(
    compiled: Compiled, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compiling, "RECOMPILE_LIMIT", 2)
    results = [compiled.try_call(torch.zeros(size)) for size in (1, 2, 3, 1)]
    assert [result is None for result in results] == [False, False, True, True]
    assert "runs uncompiled" in caplog.text
