"""What lies at which step in TensorBoard."""

import json
from unittest.mock import Mock

from PIL import Image

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
