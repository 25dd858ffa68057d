"""Adapters from an S3-compatible server, a process of its own that checks signatures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from botocore.config import Config
from botocore.session import Session

from cache.artifact import AdapterFiles
from cache.errors import SourceForbidden, SourceMoved, SourceNotFound
from cache.sources import NO_CREDENTIALS, Credentials, Limits, Sources, download
from cache.sources.download import Downloads
from cache.sources.s3 import S3Source
from servicekit.errors import InvalidField
from tests.cache.conftest import make_tensors, write_adapter
from tests.cache.test_process import free_port

WEIGHTS = "adapter_model.safetensors"
LIMITS = Limits(2.0, 5.0, 20.0, 1 << 24, 2)


@dataclass
class Store:
    url: str
    keys: Credentials
    strangers: Credentials
    client: Any

    def put(self, folder: Path, prefix: str) -> None:
        for path in folder.iterdir():
            self.client.put_object(Bucket="models", Key=f"{prefix}/{path.name}", Body=path.read_bytes())

    def source(self, folder: Path) -> Sources:
        return Sources({"s3": S3Source(Downloads(folder / "downloads"), LIMITS, [], self.url, "us-east-1")}, LIMITS)


def client_of(url: str, name: str, keys: Credentials) -> Any:
    return Session().create_client(
        name, "us-east-1", endpoint_url=url, aws_access_key_id=keys.access_key_id or "x",
        aws_secret_access_key=keys.secret_access_key or "x",
        config=Config(s3={"addressing_style": "path"}, retries={"max_attempts": 0}),
    )  # fmt: skip


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    # So many free calls to set up users; from then on every signature and right is checked.
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-p", str(port)],
        env={**os.environ, "INITIAL_NO_AUTH_ACTION_COUNT": "5"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield set_up(url)
    finally:
        process.kill()
        process.wait()


def set_up(url: str) -> Store:
    iam, deadline = client_of(url, "iam", NO_CREDENTIALS), time.monotonic() + 30
    while True:
        try:
            iam.create_user(UserName="owner")
            break
        except Exception:  # noqa: BLE001 - it is still starting
            assert time.monotonic() < deadline
            time.sleep(0.1)
    everything = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "*", "Resource": "*"}]}
    iam.put_user_policy(UserName="owner", PolicyName="all", PolicyDocument=json.dumps(everything))
    iam.create_user(UserName="stranger")
    made = [iam.create_access_key(UserName=name)["AccessKey"] for name in ("owner", "stranger")]
    keys, strangers = (
        Credentials(access_key_id=key["AccessKeyId"], secret_access_key=key["SecretAccessKey"]) for key in made
    )
    s3 = client_of(url, "s3", keys)
    s3.create_bucket(Bucket="models")
    return Store(url, keys, strangers, s3)


@pytest.fixture(autouse=True)
def short_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "FIRST_DELAY_SECONDS", 0.005)


async def read(sources: Sources, uri: str, credentials: Credentials) -> AdapterFiles:
    return await sources.fetch(uri, await sources.look(uri, credentials), credentials)


async def test_a_folder_of_a_bucket_is_read_by_who_may(store: Store, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", make_tensors(rank=64))
    store.put(adapter, "team a/poet+1")
    sources = store.source(tmp_path)
    files = await read(sources, "s3://models/team a/poet+1/", store.keys)
    assert files.weights == (adapter / WEIGHTS).read_bytes()
    forged = Credentials(access_key_id=store.keys.access_key_id, secret_access_key="x" * 40)
    for wrong in (NO_CREDENTIALS, store.strangers, forged):
        with pytest.raises(SourceForbidden):
            await sources.look("s3://models/team a/poet+1", wrong)
    await sources.close()


async def test_an_overwritten_object_is_another_revision(store: Store, tmp_path: Path) -> None:
    store.put(write_adapter(tmp_path / "adapter"), "moving")
    sources = store.source(tmp_path)
    before = await sources.look("s3://models/moving", store.keys)
    store.put(write_adapter(tmp_path / "adapter", make_tensors(seed=1)), "moving")
    assert await sources.look("s3://models/moving", store.keys) != before
    with pytest.raises(SourceMoved):
        await sources.fetch("s3://models/moving", before, store.keys)
    await sources.close()


async def test_a_part_is_continued_with_a_signed_range(store: Store, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", make_tensors(rank=64))
    store.put(adapter, "resumed")
    sources = store.source(tmp_path)
    source = sources._served["s3"]
    assert isinstance(source, S3Source)
    uri = "s3://models/resumed"
    tags = json.loads(await sources.look(uri, store.keys))
    file = (await source._files(uri, store.keys))(WEIGHTS, tags[WEIGHTS])
    whole = (adapter / WEIGHTS).read_bytes()
    part = download._Part(tmp_path / "part", file.etag)
    part.begin(file.etag)
    part.add(whole[:1234])
    await download._continue(source._client, file, part)
    assert part.take() == whole
    await sources.close()


async def test_what_is_not_there_or_malformed_is_named(store: Store, tmp_path: Path) -> None:
    sources = store.source(tmp_path)
    with pytest.raises(SourceNotFound):
        await sources.look("s3://models/nothing", store.keys)
    for uri in ("s3://", "s3://x", "s3://UPPER/key", "s3://models/../x", "s3://models/a//b", "s3://a..b/c"):
        with pytest.raises(InvalidField):
            await sources.look(uri, store.keys)
    await sources.close()
