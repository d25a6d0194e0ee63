"""Tests with images and shards in S3, on a local server that injects failures, and memory://."""

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import DomainDispatcherApplication, create_backend_app
from s3fs import S3FileSystem
from werkzeug.serving import make_server

from precompute.estimators import SpectralOptions
from precompute.job import Job
from precompute.plan import make_plan
from precompute.reencode import Resize
from precompute.shard_builder import ShardBuilder
from precompute.sources import list_images
from precompute.sources.trees import Folder
from schemas import ShardDataset, UserError
from schemas.cli import get_status
from schemas.storage import Store
from schemas.tables import SHARD_FOLDER
from tests.conftest import encode, noise
from tests.precompute.conftest import run_here, without_ray

pytestmark = pytest.mark.slow

IMAGES = 24
SHARDS = 6


class Flaky:
    """S3 server that answers a request with the error that `fail` returns, or else normally."""

    def __init__(self) -> None:
        self.s3 = DomainDispatcherApplication(create_backend_app)
        self.fail: Callable[[dict[str, Any]], str | None] = lambda request: None

    def __call__(self, environ: dict[str, Any], start: Any) -> Any:
        if status := self.fail(environ):
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            code = "SlowDown" if status.startswith("503") else "AccessDenied"
            body = f"<Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
            start(status, [("Content-Type", "text/xml"), ("Content-Length", str(len(body)))])
            return [body]
        return self.s3(environ, start)


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Flaky]:
    """Provide a server with two buckets and some images; its address and keys are in os.environ."""
    flaky = Flaky()
    server = make_server("127.0.0.1", 0, flaky, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    S3FileSystem.clear_instance_cache()  # cached instances use an earlier test's server
    client = boto3.client("s3")
    for bucket in ("photos", "shards"):
        client.create_bucket(Bucket=bucket)
    for index in range(IMAGES):
        name = f"root/{'ab'[index % 2]}/{index}.jpg"
        client.put_object(Bucket="photos", Key=name, Body=encode(noise(index)))
    yield flaky
    server.shutdown()
    S3FileSystem.clear_instance_cache()


@pytest.fixture
def workers_use_s3(s3: Flaky, shared_ray: Path) -> Iterator[None]:
    """Let the workers of the shared Ray use the server, as this process does by `os.environ`."""
    options = {
        "endpoint_url": "AWS_ENDPOINT_URL",
        "region": "AWS_DEFAULT_REGION",
        "aws_access_key_id": "AWS_ACCESS_KEY_ID",
        "aws_secret_access_key": "AWS_SECRET_ACCESS_KEY",
    }
    lines = [f"{option} = {os.environ[variable]}" for option, variable in options.items()]
    shared_ray.write_text("\n".join(["[default]", *lines, ""]))
    yield
    shared_ray.unlink()


def precompute(out: str) -> int | None:
    """Run the command in this process; return its exit status."""
    arguments = [
        *("--dataset", "folder", "--root", "s3://photos/root", "--out", out, "--workers", "1"),
        *("--shard-samples", str(IMAGES // SHARDS), "--estimator", "spectral"),
    ]
    return get_status(lambda: run_here(*arguments))


@pytest.mark.usefixtures("workers_use_s3")
def test_a_store_that_fails_in_the_middle_costs_no_image(
    s3: Flaky, capfd: pytest.CaptureFixture[str]
) -> None:
    """First refuse all requests after two shards; then tell every twelfth request to slow down."""
    puts = []

    def refuse(request: dict[str, Any]) -> str | None:
        if request["REQUEST_METHOD"] == "PUT" and request["PATH_INFO"].endswith(".parquet"):
            puts.append(request["PATH_INFO"])
        return "403 Forbidden" if len(puts) > 2 and "/shards/" in request["PATH_INFO"] else None

    s3.fail = refuse
    capfd.readouterr()  # without what the fixtures have printed
    assert precompute("s3://shards/out") == 2
    errors = capfd.readouterr().err
    assert "no permission to write" in errors
    assert len(errors.splitlines()) == 1, errors

    count, asked = iter(range(10**6)), []

    def slow(request: dict[str, Any]) -> str | None:
        asked.append(request["PATH_INFO"])
        return "503 Slow Down" if next(count) % 12 == 0 else None

    s3.fail = slow
    status = precompute("s3://shards/out")
    s3.fail = lambda request: None
    said = capfd.readouterr()
    assert status == 0, said.err
    assert "rejects: none" in said.out
    assert len(asked) > 50
    dataset = ShardDataset.open("s3://shards/out")
    assert len(dataset) == IMAGES
    assert dataset.verify().clean
    # Compare with a job without Ray, because Ray's workers could not read this process's memory://.
    source = Folder("s3://photos/root", "train", False)
    images, _ = list_images(source.images())
    plan = make_plan(images, seed=0, shard_samples=IMAGES // SHARDS)
    job = Job("folder", "train", source, plan, [], SpectralOptions(), 0, "memory://job/out", 32)
    assert dataset.digest == without_ray(job).digest


def test_a_source_that_refuses_rejects_nothing(s3: Flaky) -> None:
    """Expired credentials are not the fault of the image that was requested last."""
    source = Folder("s3://photos/root", "train", False)
    images, _ = list_images(source.images())
    store = Store("memory://refused/out")
    builder = ShardBuilder(source, SpectralOptions().build(), store, 4, Resize(), {})
    asked = []

    def refuse(request: dict[str, Any]) -> str | None:
        asked.append(request["PATH_INFO"])
        return "403 Forbidden" if len(asked) > 10 else None

    s3.fail = refuse
    with pytest.raises(UserError, match=r"\w/\d+\.jpg: the source fails"):
        builder.build(0, images)
    assert not store.sizes(SHARD_FOLDER)
