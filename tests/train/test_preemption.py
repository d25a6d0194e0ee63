"""Training where signals cannot be handled."""

import signal
from concurrent.futures import ThreadPoolExecutor

import train.trainer
from tests.train.runs import config, metrics


def test_a_run_in_another_thread_trains_and_says_what_it_cannot_do(shards, tmp_path, capsys):
    before = [signal.getsignal(number) for number in train.preemption.SIGNALS]
    with ThreadPoolExecutor() as threads:
        path = threads.submit(train.trainer.train, config(shards, tmp_path, epochs=1)).result()
    assert path.exists()
    assert len(metrics(tmp_path)) == 3
    note = "note: not in the main thread: signals and Ctrl-C do not save a checkpoint\n"
    assert note in capsys.readouterr().out
    assert [signal.getsignal(number) for number in train.preemption.SIGNALS] == before
