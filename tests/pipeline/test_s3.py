"""Shards in S3 are written, and read through the cache, on a local server."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from moto.server import ThreadedMotoServer

from schemas import ShardDataset
from tests.forked import run_forked

COMPARE = """
import sys
import boto3
import torch
from pipeline import MaskedViews
from schemas import ShardDataset, write_dataset
from tests.pipeline.conftest import small

local = ShardDataset.open(sys.argv[1])
boto3.client("s3").create_bucket(Bucket="shards")
url = "s3://shards/folder/dataset"
write_dataset(
    url, local, name="test", classes=local.classes, shard_samples=20
)
remote = ShardDataset.open(url)
assert remote.digest == local.digest, "other bytes"
assert not remote.verify().problems

def views(where):
    return MaskedViews(where, small("hp"), 8, "cpu", seed=3, report=("keys",))

one, other = views(local.url), views(url)
for step, (a, b) in enumerate(zip(one, other, strict=True)):
    assert a.sample_keys == b.sample_keys
    assert torch.equal(a.query, b.query) and torch.equal(a.hard_negative, b.hard_negative)
    if step == 2:
        state = other.state_dict()
resumed = views(url)
resumed.load_state_dict(state)
again = views(local.url)
again.load_state_dict(state)
assert [b.sample_keys for b in resumed] == [b.sample_keys for b in again]
print("the same")
"""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Start a local S3 server; its address and credentials are in the environment."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    yield f"http://{host}:{port}"
    server.stop()


@pytest.mark.slow
def test_shards_in_s3_give_the_batches_of_the_same_shards_on_disk(
    server: str, dataset: ShardDataset, tmp_path: Path
) -> None:
    # in a separate process, because s3fs clients and the cache folder persist in a process
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    done = run_forked(COMPARE, [dataset.url], tmp_path, environment)
    assert done.stdout.endswith("the same\n"), done.stdout + done.stderr
