"""What lies at which step in TensorBoard, and what a failed run leaves."""

import json
import threading
from unittest.mock import Mock

from PIL import Image

import train.trainer
from tests.train.runs import config, stopped_after
from train.metrics_logger import MetricsLogger


def test_views_and_curves_have_the_same_steps_after_a_resume_with_another_batch(tmp_path):
    """An epoch had four steps; it now has two, so step 3 of this run is the fifth that is made."""
    rows = [{"step": step, "epoch": 1, "loss": 1.0, "data_wait": 0.0} for step in range(1, 5)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    logger = MetricsLogger(tmp_path, start=2, total=4, epoch_steps=2)
    logger.board = Mock()
    logger.log_views(Image.new("RGB", (2, 2)), epoch=2)
    logger.write({"step": 3, "epoch": 2, "loss": 1.0})
    logger.file.close()
    assert logger.board.add_image.call_args.args[2] == 5
    assert logger.board.add_scalar.call_args.args[2] == 5


def test_a_run_that_fails_leaves_no_thread_and_no_open_file(shards, tmp_path, monkeypatch):
    before = threading.enumerate()
    with stopped_after(2, monkeypatch):
        train.trainer.train(config(shards, tmp_path))
    left = [thread for thread in threading.enumerate() if thread not in before]
    assert not [thread for thread in left if "Writer" in type(thread).__name__]


def test_a_full_disk_does_not_hide_the_first_error(tmp_path):
    logger = MetricsLogger(tmp_path, start=0, total=4, epoch_steps=2)
    logger.wandb = Mock()
    logger.file.close()
    with open("/dev/full", "w") as logger.file:
        logger.write({"step": 1, "epoch": 1, "loss": 1.0})
        logger.abandon()
        assert logger.file.closed
    logger.wandb.finish.assert_called_once_with(exit_code=1)
