import os
import signal
from datetime import timedelta
from types import SimpleNamespace
from unittest.mock import Mock, call, patch

import pytest
import torch

from schemas import UserError
from train import distributed, process_group
from train.preemption import PreemptionListener


def shuffled(rows):
    rank = distributed.rank()
    x = torch.arange(rank * rows, (rank + 1) * rows).view(rows, 1, 1, 1).expand(rows, 3, 2, 2)
    x = x.contiguous(memory_format=torch.channels_last)
    share, restore = distributed.shuffle_across_ranks(x, torch.Generator().manual_seed(3))
    back = restore(share[:, :, 0, 0])
    return share[:, 0, 0, 0].tolist(), torch.equal(back, x[:, :, 0, 0]), share.shape


def test_shuffle_sends_every_row_once_and_restores_the_order(two_ranks):
    (first, first_back, shape), (second, second_back, _) = two_ranks(shuffled, 8)
    assert sorted(first + second) == list(range(16))
    assert set(first) != set(range(8))  # rows changed ranks
    assert first_back
    assert second_back
    assert shape == (8, 3, 2, 2)


def shuffled_as_a_gather(dtype):
    """Return this rank's share, the result of an all-gather, and dtype and bytes sent."""
    everything = torch.randn(24, 3, 5, 4, generator=torch.Generator().manual_seed(1))
    mine = everything.chunk(distributed.world_size())[distributed.rank()]
    sent, send = [], torch.distributed.all_to_all_single

    def counting(output, given, *counts):
        own = sum(counts[1][: distributed.rank()])
        others = torch.ones(len(given), dtype=torch.bool)
        others[own : own + counts[1][distributed.rank()]] = False
        sent.append((given.dtype, given[others].nbytes))
        return send(output, given, *counts)

    with (
        patch("torch.distributed.all_to_all_single", counting),
        torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16),
    ):
        share, _ = distributed.shuffle_across_ranks(
            mine.contiguous(memory_format=torch.channels_last), torch.Generator().manual_seed(3)
        )
    order = torch.randperm(24, generator=torch.Generator().manual_seed(3))
    order = order.chunk(distributed.world_size())[distributed.rank()]
    assert share.is_contiguous(memory_format=torch.channels_last)
    return share, everything.to(dtype)[order], sent


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shuffle_sends_each_image_once_in_the_precision_of_the_first_layer(four_ranks, dtype):
    images = 24 // 4
    for share, expected, sent in four_ranks(shuffled_as_a_gather, dtype):
        assert share.dtype == dtype
        assert torch.equal(share, expected)
        ((sent_dtype, size),) = sent
        assert sent_dtype == dtype
        assert 0 < size <= images * 3 * 5 * 4 * dtype.itemsize


def test_shuffle_of_one_rank_does_nothing():
    generator = torch.Generator().manual_seed(0)
    x, before = torch.randn(4, 3, 2, 2), generator.get_state()
    share, restore = distributed.shuffle_across_ranks(x, generator)
    assert share is x
    assert restore(x) is x
    assert torch.equal(generator.get_state(), before)


def gathered():
    rank = distributed.rank()
    rows = distributed.all_gather(torch.full((2, 3), float(rank)))
    return rows[:, 0].tolist(), distributed.all_mean_(torch.tensor([rank, 4.0 * rank])).tolist()


def test_gather_and_mean(two_ranks):
    assert two_ranks(gathered) == [([0.0, 0.0, 1.0, 1.0], [0.5, 2.0])] * 2


def failing(rank, error):
    try:
        with distributed.raise_on_all_ranks():
            if distributed.rank() == rank:
                raise error
    except SystemExit as exit_:
        return f"exit {exit_.code}"
    except UserError as failure:
        return str(failure)
    return "went on"


def test_failure_of_one_rank_ends_all_and_rank_0_reports_it(two_ranks):
    assert two_ranks(failing, 1, UserError("no shard")) == ["rank 1: no shard", "exit 2"]
    full = OSError(28, "No space left on device", "run/x")
    assert two_ranks(failing, 0, full) == ["rank 0: run/x: No space left on device", "exit 2"]
    assert two_ranks(failing, 5, UserError("nobody")) == ["went on", "went on"]


def interrupted():
    """Return the step at which a rank notices a signal sent to rank 1 in its step 3."""
    interrupt = PreemptionListener()
    with interrupt.listen():
        for step in range(10):
            if step == 3 and distributed.rank() == 1:
                os.kill(os.getpid(), signal.SIGUSR1)
            if interrupt.poll_all_ranks():
                return step
    return None


def test_a_signal_to_one_rank_stops_all_at_the_next_step(two_ranks):
    assert two_ranks(interrupted) == [4, 4]


def test_missing_gpu_is_a_user_error(monkeypatch):
    def refuse() -> None:
        raise RuntimeError("Found no NVIDIA driver on your system. Please check ...")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", refuse)
    assert process_group.pick_device("auto") == torch.device("cpu")
    with pytest.raises(UserError, match=r"no NVIDIA driver .*--device cpu"):
        process_group.pick_device("cuda")


def pretend_gpus(monkeypatch, count):
    """Record the calls of torch.cuda and torch.distributed as on a machine with GPUs."""
    calls = Mock()
    calls.current_device.side_effect = lambda: calls.set_device.call_args.args[0]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", calls.set_device)
    monkeypatch.setattr(torch.cuda, "current_device", calls.current_device)
    monkeypatch.setattr(process_group.dist, "init_process_group", calls.init_process_group)
    monkeypatch.setattr(process_group.dist, "group", SimpleNamespace(WORLD=calls.world))
    return calls


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_a_rank_takes_its_own_gpu_before_anything_asks_for_the_current_one(monkeypatch, name):
    calls = pretend_gpus(monkeypatch, 4)
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert process_group.pick_device(name) == torch.device("cuda", 2)
    assert calls.mock_calls[0] == call.set_device(2)


def test_a_rank_without_its_own_gpu_is_refused(monkeypatch):
    calls = pretend_gpus(monkeypatch, 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="local rank 2 has no GPU: this machine has 2"):
        process_group.pick_device("auto")
    assert process_group.pick_device("cpu") == torch.device("cpu")
    assert calls.mock_calls == []


@pytest.mark.slow
def test_nccl_is_bound_to_the_gpu_and_waits_longer_than_gloo(monkeypatch):
    calls = pretend_gpus(monkeypatch, 4)
    store, gpu = torch.distributed.HashStore(), torch.device("cuda", 2)
    process_group.init_process_group(store, 2, 4, timedelta(seconds=600), gpu)
    given = calls.init_process_group.call_args.kwargs
    assert given["device_id"] == gpu
    assert given["timeout"] == timedelta(seconds=600)
    calls.world._get_backend.assert_called_once_with(gpu)
    backend = calls.world._get_backend.return_value
    backend._set_default_timeout.assert_called_once_with(timedelta(seconds=660))


def test_on_cpus_only_gloo_is_joined(monkeypatch):
    calls = pretend_gpus(monkeypatch, 4)
    monkeypatch.setenv("LOCAL_RANK", "1")
    gpu = process_group.select_own_gpu("cpu")
    process_group.init_process_group(torch.distributed.HashStore(), 1, 2, timedelta(seconds=9), gpu)
    assert calls.init_process_group.call_args.args == ("gloo",)
    assert calls.set_device.call_count == 0


@pytest.mark.parametrize("name", ["ProcessGroupNCCL", "ProcessGroupGloo"])
def test_torch_has_what_sets_the_timeout_of_one_backend(name):
    """The function is private; its absence must be noticed here and not on a cluster."""
    if not hasattr(torch.distributed, name):
        pytest.skip(f"this torch is built without {name}")
    assert hasattr(getattr(torch.distributed, name), "_set_default_timeout")
