import io
import os
import pickle
import random
import shutil
import zipfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from threading import Timer
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from schemas import UserError
from train import checkpoint
from train.checkpoint import Checkpoints
from train.metrics_logger import drop_lines_after
from train.optim import OptimConfig, build_optimizer

SETTINGS = {"optim.lr": 0.03, "epochs": 2, "steps_per_epoch": 4, "batch_size": 8}


class Loader:
    def __init__(self, position=0):
        self.position = position

    def state_dict(self):
        return {"position": self.position, "opaque": b"\x00\xff"}

    def load_state_dict(self, state):
        assert state["opaque"] == b"\x00\xff"
        self.position = state["position"]


def state(seed=0, position=0):
    torch.manual_seed(seed)
    model = torch.nn.Linear(3, 2)
    optimizer = build_optimizer(model, OptimConfig())
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()  # momentum buffers exist
    return model, optimizer, Loader(position)


def checkpoints(folder, keep=2, **changes):
    return Checkpoints(folder=folder, keep=keep, settings=SETTINGS | changes, batch_may_change=True)


def restore(these, *parts):
    return these.restore(these.agree_on_last(), *parts)


def draws():
    return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002


def test_restore_recovers_the_whole_state(tmp_path):
    model, optimizer, loader = state(seed=1, position=7)
    checkpoints(tmp_path).save(3, model, optimizer, loader)
    expected = draws()
    other_model, other_optimizer, other_loader = state(seed=2)
    restored = restore(checkpoints(tmp_path), other_model, other_optimizer, other_loader)
    assert restored == (3, 1, 8)
    assert draws() == expected
    assert other_loader.position == 7
    for mine, theirs in zip(model.parameters(), other_model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        mine_momentum = optimizer.state[mine]["momentum_buffer"]
        assert torch.equal(mine_momentum, other_optimizer.state[theirs]["momentum_buffer"])


def test_nothing_to_restore(tmp_path):
    assert restore(checkpoints(tmp_path / "missing"), *state()) == (0, 1, None)


def test_keeps_the_last_checkpoint_and_resumes_from_it(tmp_path):
    for step in (1, 2, 3, 10):
        checkpoints(tmp_path).save(step, *state())
    assert checkpoints(tmp_path).steps() == [3, 10]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000010"]
    assert restore(checkpoints(tmp_path), *state()) == (10, 1, 8)


def test_a_checkpoint_of_newer_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "VERSION", checkpoint.VERSION + 1)
    checkpoints(tmp_path).save(1, *state())
    monkeypatch.undo()
    with pytest.raises(UserError, match="checkpoint version 3, this code reads up to 2"):
        restore(checkpoints(tmp_path), *state())


def test_memory_that_runs_out_is_no_misfit(tmp_path):
    checkpoints(tmp_path).save(1, *state())
    model = Mock(load_state_dict=Mock(side_effect=RuntimeError("out of memory")))
    with pytest.raises(RuntimeError, match="out of memory"):
        restore(checkpoints(tmp_path), model, *state()[1:])


def test_files_are_on_disk_before_they_have_their_name(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync

    def note(descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        synced.append((path.relative_to(tmp_path).parts, checkpoints(tmp_path).steps()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    checkpoints(tmp_path).save(1, *state())
    hidden = ".step-00000001.tmp"
    files = [(hidden, "rank-0000.pt"), (hidden, "state.pt"), (hidden,)]
    assert synced == [*((parts, []) for parts in files), ((), [1])]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("writer")])
def test_failed_save_leaves_earlier_checkpoints_intact(tmp_path, monkeypatch, error):
    checkpoints(tmp_path).save(1, *state(seed=1))
    save, calls = torch.save, []

    def second_fails(content, file):
        calls.append(content)
        if len(calls) == 2:
            file.write(b"half of it")
            raise error
        save(content, file)

    monkeypatch.setattr(torch, "save", second_fails)
    with pytest.raises(UserError, match=r"step 2 could not be written \(.*\); earlier ones"):
        checkpoints(tmp_path, keep=1).save(2, *state(seed=2))
    monkeypatch.undo()
    assert checkpoints(tmp_path).steps() == [1]
    assert restore(checkpoints(tmp_path), *state()) == (1, 1, 8)
    checkpoints(tmp_path, keep=1).save(
        2, *state(seed=2)
    )  # a partly written checkpoint does no harm
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


class FailingFile(io.BytesIO):
    """A file whose writes fail after the first."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error, self.writes = error, 0

    def write(self, content) -> int:
        self.writes += 1
        if self.writes > 1:
            raise self.error
        return super().write(content)


def test_a_failed_write_is_reported_for_its_own_reason():
    """torch closes its archive after the failure and reports `unexpected pos`."""
    for error in (OSError(28, "No space left on device"), KeyboardInterrupt()):
        path = Mock()
        path.open.return_value = FailingFile(error)
        with pytest.raises(type(error)) as raised:
            checkpoint.write_state(path, {"weights": torch.zeros(100_000)})
        assert raised.value is error


def test_other_settings_are_refused_by_name(tmp_path):
    checkpoints(tmp_path).save(1, *state())
    with pytest.raises(UserError, match=r"epochs was 2, is 3; optim.lr was 0.03, is 0.1\. Repeat"):
        restore(checkpoints(tmp_path, epochs=3, **{"optim.lr": 0.1}), *state())


@pytest.mark.parametrize(
    "changed", [torch.nn.Linear(3, 5), torch.nn.Sequential(torch.nn.Linear(3, 2))]
)
def test_a_network_whose_code_has_changed_is_explained(tmp_path, changed):
    model, optimizer, loader = state()
    checkpoints(tmp_path).save(1, model, optimizer, loader)
    with pytest.raises(UserError, match=r"step-00000001: does not fit the networks.*weight.*Rest"):
        restore(checkpoints(tmp_path), changed, optimizer, loader)
    two_groups = [{"params": [parameter]} for parameter in model.parameters()]
    other = torch.optim.SGD(two_groups, lr=0.1)
    with pytest.raises(UserError, match=r"networks, .* has changed .*parameter groups\)\. Restore"):
        restore(checkpoints(tmp_path), model, other, loader)


@pytest.mark.parametrize("step", [4, 5])  # at the end of an epoch and inside one
def test_another_world_size_resumes_after_any_step(tmp_path, monkeypatch, step):
    saved = state(seed=3)
    checkpoints(tmp_path).save(step, *saved)
    for rank in range(2):
        monkeypatch.setattr(checkpoint, "world_size", lambda: 2)
        monkeypatch.setattr(checkpoint, "rank", lambda rank=rank: rank)
        model, optimizer, loader = state(seed=4)
        assert restore(checkpoints(tmp_path), model, optimizer, loader) == (step, 1, 8)
        assert loader.state_dict() == saved[2].state_dict()
        assert all(map(torch.equal, model.parameters(), saved[0].parameters()))


class Payload:
    def __reduce__(self):
        return print, ("code ran",)


def test_damage_and_foreign_code_are_refused(tmp_path, capsys):
    checkpoints(tmp_path).save(1, *state())
    file = tmp_path / "step-00000001" / "state.pt"
    whole = file.read_bytes()
    for content in (whole[: len(whole) // 2], b"", pickle.dumps(Payload(), protocol=2)):
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"damaged .*; remove .*step-00000001 to resume"):
            restore(checkpoints(tmp_path), *state())
    assert "code ran" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["state.pt", "rank-0000.pt"])
def test_a_flipped_bit_is_noticed(tmp_path, name):
    checkpoints(tmp_path).save(1, *state())
    file = tmp_path / "step-00000001" / name
    with zipfile.ZipFile(file) as archive:
        content = archive.read(max(archive.infolist(), key=lambda info: info.file_size))
    whole = file.read_bytes()
    place = whole.index(content) + len(content) // 2
    file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with pytest.raises(UserError, match=rf"{name}: damaged \(BadZipFile\); remove "):
        restore(checkpoints(tmp_path), *state())


def test_every_error_of_a_damaged_pickle_is_explained(tmp_path):
    checkpoints(tmp_path).save(1, *state())
    file = tmp_path / "step-00000001" / "state.pt"
    whole = bytearray(file.read_bytes())
    begin = whole.index(b"settings") - 20
    for place in range(begin, begin + 400, 7):
        damaged = whole.copy()
        damaged[place : place + 2] = b"\xc4\x00"
        file.write_bytes(damaged)
        with suppress(UserError):  # bytes of a number or a text may change without an error
            checkpoint.read_state(file, checks=False)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            PermissionError(13, "Permission denied"),
            r"cannot be read \(Permission denied\); look",
        ),
        (OSError(5, "Input/output error"), "cannot be read .* run the same command again$"),
        (FileNotFoundError(2, "gone"), "missing; if no machine that shares the folder sees it"),
    ],
)
def test_a_checkpoint_that_may_be_intact_is_not_to_be_removed(
    tmp_path, monkeypatch, error, message
):
    checkpoints(tmp_path).save(1, *state())
    monkeypatch.setattr(torch, "load", Mock(side_effect=error))
    with pytest.raises(UserError, match=message):
        restore(checkpoints(tmp_path), *state())
    full = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
    monkeypatch.setattr(torch, "load", Mock(side_effect=RuntimeError(full)))
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        restore(checkpoints(tmp_path), *state())


def test_a_copy_of_a_checkpoint_under_another_name_is_ignored(tmp_path):
    checkpoints(tmp_path).save(1, *state())
    for name in ("step-00000001-backup", "step-00000002 (copy)", "step-", "step-7"):
        shutil.copytree(tmp_path / "step-00000001", tmp_path / name)
    assert restore(checkpoints(tmp_path, keep=1), *state()) == (1, 1, 8)
    checkpoints(tmp_path, keep=1).save(3, *state())
    assert checkpoints(tmp_path).steps() == [3]
    assert len(list(tmp_path.iterdir())) == 5


def test_metrics_are_cut_to_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [f'{{"step": {step}, "epoch": {(step + 2) // 3}}}\n' for step in range(1, 7)]
    path.write_text("".join(lines) + '{"st')
    drop_lines_after(path, 5, epoch_steps=3)
    assert path.read_text() == "".join(lines[:5])
    drop_lines_after(path, 3, epoch_steps=3)
    assert path.read_text() == "".join(lines[:3])
    drop_lines_after(path, 0, epoch_steps=3)
    assert path.read_text() == ""


@pytest.mark.parametrize("line", ["\0\0\0", "[1]", '{"loss": 2.0}'])
def test_metrics_with_a_damaged_line_are_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    content = f'{{"step": 1, "epoch": 1}}\n{line}\n{{"step": 2, "epoch": 1}}\n'
    path.write_text(content)
    with pytest.raises(UserError, match=r"metrics\.jsonl: a line is damaged, .*; remove it and"):
        drop_lines_after(path, 1, epoch_steps=3)
    assert path.read_text() == content


@pytest.mark.parametrize("epoch_steps", [1, 6])
def test_metrics_of_another_batch_are_cut_to_the_checkpoint(tmp_path, epoch_steps):
    """Their epochs have three steps; the checkpoint is that of the end of the first."""
    path = tmp_path / "metrics.jsonl"
    lines = [f'{{"step": {step}, "epoch": {(step + 2) // 3}}}\n' for step in range(1, 7)]
    path.write_text("".join(lines))
    drop_lines_after(path, epoch_steps, epoch_steps)
    assert path.read_text() == "".join(lines[:3])


@pytest.mark.parametrize(("batch_size", "epoch_steps"), [(4, 8), (16, 2)])
def test_another_batch_is_accepted_where_an_epoch_ended(tmp_path, batch_size, epoch_steps):
    before = checkpoints(tmp_path)
    before.save(3, *state())
    before.save(4, *state(seed=1, position=4))
    factor = batch_size / 8
    own = {"batch_size": batch_size, "steps_per_epoch": epoch_steps}
    for lr in (0.03, 0.03 * factor):  # given, and scaled by the batch
        _, _, loader = restored = state()
        after = checkpoints(tmp_path, **own, **{"optim.lr": lr})
        assert restore(after, *restored) == (epoch_steps, 1, 8)
        assert loader.position == 4
        after.rename_last(epoch_steps)
        assert after.steps() == [epoch_steps]
    with pytest.raises(UserError, match=r"optim\.lr was 0\.03, is 0\.02"):
        restore(checkpoints(tmp_path, **own, **{"optim.lr": 0.02}), *state())
    assert restore(before, *state()) == (4, 1, 8)  # the same command as at first works too


def test_the_number_of_micro_batches_may_change_if_the_method_does_not_depend_on_it(tmp_path):
    checkpoints(tmp_path, grad_accum_steps=1).save(4, *state())
    other = checkpoints(tmp_path, grad_accum_steps=4)
    with pytest.raises(UserError, match="grad_accum_steps was 1, is 4"):
        restore(other, *state())
    other = replace(other, changeable=frozenset({"grad_accum_steps"}))
    assert restore(other, *state()).step == 4


def test_another_batch_is_refused_inside_an_epoch_and_after_the_last(tmp_path):
    checkpoints(tmp_path).save(5, *state())
    other = checkpoints(tmp_path, batch_size=4, steps_per_epoch=8)
    with pytest.raises(UserError, match="epoch 2 has begun with batches of 8; --batch-size 4 is"):
        restore(other, *state())
    checkpoints(tmp_path).save(8, *state())
    with pytest.raises(UserError, match="batch_size was 8, is 4"):
        restore(other, *state())


def test_another_batch_is_refused_where_it_may_not_change(tmp_path):
    checkpoints(tmp_path).save(4, *state())
    other = checkpoints(tmp_path, batch_size=4, steps_per_epoch=8)
    with pytest.raises(UserError, match="batch_size was 8, is 4"):
        restore(replace(other, batch_may_change=False), *state())


def saving(folder, failing_rank):
    if torch.distributed.get_rank() == failing_rank:
        torch.save = lambda content, file: (_ for _ in ()).throw(OSError(28, "disk full"))
    try:
        checkpoints(folder).save(1, *state())
    except (UserError, SystemExit) as error:
        return str(error)
    finally:
        torch.save = torch.serialization.save
    return sorted(path.name for path in (folder / "step-00000001").iterdir())


def test_ranks_save_together_or_not_at_all(tmp_path, two_ranks):
    failed = two_ranks(saving, tmp_path / "a", 1)
    assert "rank 1" in failed[0]
    assert "disk full" in failed[0]
    assert failed[1] == "2"
    assert not list((tmp_path / "a").glob("step-*"))
    names = ["rank-0000.pt", "rank-0001.pt", "state.pt"]
    assert names in two_ranks(saving, tmp_path / "b", None)


def restoring(folder, hidden):
    """Restore; rank 1 does not list the checkpoint `hidden`."""
    listed = Checkpoints.steps
    if torch.distributed.get_rank() == 1:
        Checkpoints.steps = lambda self: [step for step in listed(self) if step != hidden]
    try:
        return restore(checkpoints(folder), *state()).step
    finally:
        Checkpoints.steps = listed


def test_ranks_restore_the_checkpoint_that_rank_0_sees(tmp_path, two_ranks):
    for step in (4, 5):
        checkpoints(tmp_path).save(step, *state())
    assert two_ranks(restoring, tmp_path, 5) == [5, 5]


def test_a_checkpoint_that_appears_late_is_awaited(tmp_path, monkeypatch):
    late = tmp_path / "step-00000004"
    timer = Timer(0.2, late.mkdir)
    timer.start()
    checkpoint.wait_until_visible(late)
    timer.join()
    monkeypatch.setattr(checkpoint, "SECONDS_UNTIL_VISIBLE", 0.1)
    with pytest.raises(UserError, match=r"step-00000005: rank 0 sees it, but .* not"):
        checkpoint.wait_until_visible(tmp_path / "step-00000005")
