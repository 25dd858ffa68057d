"""Adapters from web servers and a hub, over real connections: whole, resumed, within limits, and only by who may read them."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from cache.artifact import AdapterFiles
from cache.errors import (
    MalformedAdapter,
    SourceForbidden,
    SourceMoved,
    SourceNotFound,
    SourceTooSlow,
    SourceUnreachable,
)
from cache.sources import (
    NO_CREDENTIALS,
    Credentials,
    FileSource,
    GivenCredentials,
    Limits,
    Sources,
    download,
    read_credentials,
    remote,
)
from cache.sources.download import Downloads, RemoteFile
from cache.sources.hub import HubSource
from cache.sources.web import WebSource
from servicekit.errors import InvalidField, NotImplementedYet, StartupError
from tests.cache.conftest import make_tensors, write_adapter
from tests.cache.stand_ins import COMMIT, Hub, Web, serving

LOOPBACK = [ipaddress.ip_network("127.0.0.0/8")]
QUICK = Limits(1.0, 0.4, 3.0, 1 << 24, 2)
# For what is not about deadlines.
PATIENT = Limits(30.0, 30.0, 60.0, 1 << 24, 2)
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(autouse=True)
def short_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "FIRST_DELAY_SECONDS", 0.005)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter", make_tensors(("q_proj", "up_proj"), rank=64))


@pytest.fixture
def web(adapter: Path) -> Iterator[Web]:
    with serving(Web()) as server:
        server.put(adapter, "/a")
        yield server


@asynccontextmanager
async def web_source(folder: Path, limits: Limits = QUICK, networks: Any = LOOPBACK) -> AsyncIterator[Sources]:
    source = WebSource(Downloads(folder / "downloads"), limits, networks)
    sources = Sources({"https": source, "http": source}, limits)
    yield sources
    await sources.close()


async def read(sources: Sources, uri: str, credentials: Credentials = NO_CREDENTIALS) -> AdapterFiles:
    return await sources.fetch(uri, await sources.look(uri, credentials), credentials)


def files_of(folder: Path) -> list[Path]:
    return list(folder.iterdir())


def same(files: AdapterFiles, folder: Path) -> bool:
    return files.weights == (folder / WEIGHTS).read_bytes() and b"LORA" in files.config


async def test_a_folder_on_a_web_server_is_read(web: Web, adapter: Path, tmp_path: Path) -> None:
    (adapter / "chat_template.jinja").write_text("{{ messages }}")
    web.put(adapter, "/a")
    async with web_source(tmp_path) as sources:
        files = await read(sources, f"{web.url}/a/")
        assert same(files, adapter) and files.chat_template == "{{ messages }}"
        assert not list((tmp_path / "downloads").iterdir())


async def test_a_download_that_breaks_goes_on_where_it_broke(web: Web, adapter: Path, tmp_path: Path) -> None:
    size = len(web.files[f"/a/{WEIGHTS}"])
    web.cut = [size // 3, size // 3, 100]
    async with web_source(tmp_path) as sources:
        assert same(await read(sources, f"{web.url}/a"), adapter)
    starts = [asked.headers.get("range", "bytes=0-") for asked in web.bodies(WEIGHTS)]
    assert starts[0] == "bytes=0-" and len(starts) == 4
    positions = [int(start.removeprefix("bytes=").rstrip("-")) for start in starts]
    assert positions == sorted(positions) and positions[1] > 0 and positions[3] > positions[1]
    assert all("if-range" in asked.headers for asked in web.bodies(WEIGHTS)[1:])


async def test_the_next_process_goes_on_with_what_the_last_one_got(web: Web, adapter: Path, tmp_path: Path) -> None:
    web.hang = 30
    async with web_source(tmp_path, Limits(1, 5, 0.5, 1 << 24, 2)) as sources:
        with pytest.raises(SourceTooSlow):
            await read(sources, f"{web.url}/a")
    web.hang = 0
    async with web_source(tmp_path) as sources:
        assert same(await read(sources, f"{web.url}/a"), adapter)
    begun = web.bodies(WEIGHTS)[-1].headers["range"]
    assert 0 < int(begun.removeprefix("bytes=").rstrip("-")) < len(web.files[f"/a/{WEIGHTS}"])


@pytest.mark.parametrize("without", ["ranges", "tags"])
async def test_a_server_that_cannot_resume_is_asked_for_everything_again(
    web: Web, adapter: Path, tmp_path: Path, without: str
) -> None:
    setattr(web, without, False)
    web.cut = [len(web.files[f"/a/{WEIGHTS}"]) // 2]
    async with web_source(tmp_path) as sources:
        assert same(await read(sources, f"{web.url}/a"), adapter)


async def test_a_file_that_changes_between_looking_and_reading_is_refused(web: Web, tmp_path: Path) -> None:
    async with web_source(tmp_path) as sources:
        revision = await sources.look(f"{web.url}/a")
        web.files[f"/a/{WEIGHTS}"] = b"something else"
        with pytest.raises(SourceMoved):
            await sources.fetch(f"{web.url}/a", revision)
        assert await sources.look(f"{web.url}/a") != revision


async def test_a_busy_server_is_asked_again_and_a_dead_one_given_up(web: Web, adapter: Path, tmp_path: Path) -> None:
    async with web_source(tmp_path) as sources:
        web.busy = 3
        assert same(await read(sources, f"{web.url}/a"), adapter)
        web.busy = 1000
        with pytest.raises(SourceUnreachable, match="503"):
            await read(sources, f"{web.url}/a")
    async with web_source(tmp_path) as sources:
        with pytest.raises(SourceUnreachable):
            await sources.look("http://127.0.0.1:1/a")


async def test_a_source_that_stops_in_the_middle_costs_its_deadline_and_no_more(web: Web, tmp_path: Path) -> None:
    web.hang, web.ranges = 30, False
    began = time.monotonic()
    async with web_source(tmp_path) as sources:
        with pytest.raises((SourceTooSlow, SourceUnreachable)):
            await read(sources, f"{web.url}/a")
    assert time.monotonic() - began < QUICK.total_seconds + 1


@pytest.mark.parametrize("announced", [True, False])
async def test_a_file_larger_than_allowed_is_refused_while_it_comes(
    web: Web, adapter: Path, tmp_path: Path, announced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not announced:
        monkeypatch.setattr("cache.sources.download._begin", _begin_blindly)
    async with web_source(tmp_path, Limits(1, 1, 3, 5000, 2)) as sources:
        with pytest.raises(MalformedAdapter, match="the limit is 5000") as refused:
            await read(sources, f"{web.url}/a")
    assert refused.value.reason == "FILE_TOO_LARGE"


async def _begin_blindly(file: Any, response: Any, part: Any) -> None:
    """As for a server that does not say how much will come."""
    part.begin("")


async def test_what_is_not_there_is_named(web: Web, adapter: Path, tmp_path: Path) -> None:
    async with web_source(tmp_path) as sources:
        with pytest.raises(SourceNotFound):
            await read(sources, f"{web.url}/nothing")
        web.files["/p/adapter_config.json"] = web.files["/a/adapter_config.json"]
        with pytest.raises(MalformedAdapter, match=r"adapter_model\.safetensors: is missing"):
            await read(sources, f"{web.url}/p")
        web.files["/p/adapter_model.bin"] = b"pickle"
        with pytest.raises(MalformedAdapter, match="never loaded"):
            await read(sources, f"{web.url}/p")


async def test_a_private_folder_needs_the_callers_own_right_every_time(
    web: Web, adapter: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    web.token = "s3cret-token"
    web.put(adapter, "/private/a")
    async with web_source(tmp_path) as sources:
        assert same(await read(sources, f"{web.url}/private/a", Credentials(token="s3cret-token")), adapter)
        for wrong in (NO_CREDENTIALS, Credentials(token="another")):
            with pytest.raises(SourceForbidden) as refused:
                await sources.look(f"{web.url}/private/a", wrong)
            assert "another" not in refused.value.message
    assert "s3cret-token" not in caplog.text and "s3cret-token" not in repr(Credentials(token="s3cret-token"))


@pytest.mark.parametrize(
    "uri, reason",
    [
        ("https://user:password@host/a", "MALFORMED_URI"),
        ("https://host/a?token=x", "MALFORMED_URI"),
        ("https://host/a#x", "MALFORMED_URI"),
        ("https://host/a/../b", "MALFORMED_URI"),
        ("https://host/a/%2e%2e/b", "MALFORMED_URI"),
        ("https:///a", "MALFORMED_URI"),
        ("https://host:99999/a", "MALFORMED_URI"),
        ("https://127.0.0.1/a", "ADDRESS_REFUSED"),
        ("https://[::1]/a", "ADDRESS_REFUSED"),
        ("https://[::ffff:127.0.0.1]/a", "ADDRESS_REFUSED"),
        ("https://169.254.169.254/latest", "ADDRESS_REFUSED"),
        ("https://10.0.0.1/a", "ADDRESS_REFUSED"),
        ("https://localhost/a", "ADDRESS_REFUSED"),
        ("http://localhost/a", "ADDRESS_REFUSED"),
        ("http://93.184.215.14/a", "ADDRESS_REFUSED"),
    ],
)
async def test_where_sources_must_not_be_read_from(tmp_path: Path, uri: str, reason: str) -> None:
    async with web_source(tmp_path, networks=[]) as sources:
        with pytest.raises(InvalidField) as refused:
            await sources.look(uri)
        assert refused.value.reason == reason and "password" not in refused.value.message


async def test_a_redirect_leads_to_no_place_that_could_not_be_asked_for_itself(web: Web, tmp_path: Path) -> None:
    async with web_source(tmp_path) as sources:
        for target in ("http://10.1.2.3/x", "http://169.254.169.254/x", "file:///etc/passwd", "gopher://127.0.0.1/x"):
            web.redirects = {f"/r/{name}": target for name in ("adapter_config.json", WEIGHTS)}
            with pytest.raises(InvalidField) as refused:
                await sources.look(f"{web.url}/r")
            assert refused.value.reason in ("ADDRESS_REFUSED", "SCHEME_REFUSED"), target
        web.redirects = {f"/r/{name}": f"/r/{name}" for name in ("adapter_config.json", WEIGHTS)}
        with pytest.raises(InvalidField, match="redirects"):
            await sources.look(f"{web.url}/r")


async def test_a_token_is_not_shown_to_where_a_redirect_leads(web: Web, adapter: Path, tmp_path: Path) -> None:
    with serving(Web(), "127.0.0.2") as other:
        other.put(adapter, "/a")
        web.redirects = {f"/r/{path.name}": f"{other.url}/a/{path.name}" for path in files_of(adapter)}
        async with web_source(tmp_path) as sources:
            assert same(await read(sources, f"{web.url}/r", Credentials(token="mine")), adapter)
        assert all("authorization" not in asked.headers for asked in other.asked)
        assert all(asked.headers["authorization"] == "Bearer mine" for asked in web.asked)


async def test_a_source_that_hangs_takes_only_its_own_room(web: Web, adapter: Path, tmp_path: Path) -> None:
    web.hang = 30
    write_adapter(tmp_path / "root" / "a")
    source = WebSource(Downloads(tmp_path / "downloads"), QUICK, LOOPBACK)
    sources = Sources({"http": source, "file": FileSource([tmp_path / "root"], 1 << 20)}, QUICK)
    hanging = [asyncio.create_task(read(sources, f"{web.url}/a")) for _ in range(20)]
    await asyncio.sleep(0.1)
    began = time.monotonic()
    assert (await sources.fetch(f"file://{tmp_path}/root/a", "")).weights
    assert time.monotonic() - began < 0.5
    for task in hanging:
        task.cancel()
    await asyncio.gather(*hanging, return_exceptions=True)
    await sources.close()


async def test_a_file_system_that_hangs_costs_its_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_adapter(tmp_path / "root" / "a")
    source = FileSource([tmp_path / "root"], 1 << 20, Limits(total_seconds=0.2))
    monkeypatch.setattr(source, "read", lambda uri: time.sleep(1.0))
    with pytest.raises(SourceTooSlow):
        await source.fetch(f"file://{tmp_path}/root/a", "", NO_CREDENTIALS)
    await source.close()


async def test_kinds_that_are_not_set_up_are_refused_by_name(tmp_path: Path) -> None:
    sources = Sources({"file": FileSource([tmp_path], 1 << 20)})
    for uri in ("hf://a/b", "s3://abc/b", "https://a/b", "http://a/b"):
        with pytest.raises(NotImplementedYet):
            await sources.look(uri)


# The hub


@asynccontextmanager
async def hub_source(folder: Path, hub: Hub) -> AsyncIterator[Sources]:
    sources = Sources({"hf": HubSource(Downloads(folder / "downloads"), QUICK, [], hub.url)}, QUICK)
    yield sources
    await sources.close()


@pytest.fixture
def hub(adapter: Path) -> Iterator[Hub]:
    with serving(Hub()) as server:
        assert isinstance(server, Hub)
        server.put_repo("acme/poet", adapter)
        yield server


async def test_a_repository_is_read_at_the_commit_it_was_looked_at(hub: Hub, adapter: Path, tmp_path: Path) -> None:
    async with hub_source(tmp_path, hub) as sources:
        assert await sources.look("hf://acme/poet") == COMMIT == await sources.look("hf://acme/poet@main")
        # The branch moves on; the commit stays.
        hub.put_repo("acme/poet", write_adapter(tmp_path / "other"), "d" * 40)
        assert same(await sources.fetch("hf://acme/poet", COMMIT), adapter)
        assert await sources.look("hf://acme/poet") == "d" * 40
        # Whether the commit is still there is another question.
        assert await sources.look("hf://acme/poet", revision=COMMIT) == COMMIT
        with pytest.raises(SourceNotFound):
            await sources.look("hf://acme/poet", revision="e" * 40)
    assert any(asked.path.startswith("/cdn/") for asked in hub.asked)


async def test_a_repository_that_is_gated_private_or_not_there(hub: Hub, adapter: Path, tmp_path: Path) -> None:
    hub.gated, hub.token = {"acme/gated"}, "good"
    hub.put_repo("acme/gated", adapter)
    hub.redirects |= {f"/acme/gated/resolve/{COMMIT}/{p.name}": f"/private/acme/gated/resolve/{COMMIT}/{p.name}"
                      for p in files_of(adapter)}  # fmt: skip
    async with hub_source(tmp_path, hub) as sources:
        assert same(await read(sources, "hf://acme/gated", Credentials(token="good")), adapter)
        for wrong in (NO_CREDENTIALS, Credentials(token="bad")):
            with pytest.raises(SourceForbidden):
                await sources.look("hf://acme/gated", wrong)
        with pytest.raises(SourceNotFound):
            await sources.look("hf://acme/nothing")
        for uri in ("hf://acme", "hf://acme/..", "hf://acme/poet@../x", "hf://acme/poet/x", "hf://acme/poet@a//b"):
            with pytest.raises(InvalidField) as refused:
                await sources.look(uri)
            assert refused.value.reason == "MALFORMED_URI"


async def test_weights_other_than_the_hub_says_are_refused(hub: Hub, adapter: Path, tmp_path: Path) -> None:
    [at] = [path for path in hub.files if path.startswith("/cdn/")]
    hub.files[at] = bytes(len(hub.files[at]))
    async with hub_source(tmp_path, hub) as sources:
        with pytest.raises(MalformedAdapter, match="other than the hub says"):
            await read(sources, "hf://acme/poet")


def test_the_servers_own_rights_are_for_what_they_were_given(tmp_path: Path) -> None:
    file = tmp_path / "rights.json"
    file.write_text('[{"prefix": "hf://acme/", "token": "t"}, {"prefix": "s3://models", "ambient": true}]')
    with pytest.raises(StartupError, match="chmod 600"):
        read_credentials(str(file))
    file.chmod(0o600)
    given = read_credentials(str(file))
    assert given.of("hf://acme/poet").token == "t" and given.of("s3://models/a").ambient
    for other in ("hf://acme-others/poet", "s3://models-others/a", "https://acme/"):
        assert given.of(other) == NO_CREDENTIALS
    for text in ("{", "[1]", '[{"prefix": "x", "token": "t"}]', '[{"prefix": "hf://a", "tokn": "secret"}]'):
        file.write_text(text)
        with pytest.raises(StartupError, match="not what they should be") as refused:
            read_credentials(str(file))
        assert "secret" not in str(refused.value)
    assert GivenCredentials().of("hf://a/b") == NO_CREDENTIALS


async def test_a_folder_that_cannot_be_looked_at_leaves_no_question_open() -> None:
    class Broken:
        async def head(self, _: Any, file: RemoteFile) -> None:
            await asyncio.sleep(0 if file.name == "adapter_config.json" else 3600)
            raise SourceUnreachable("https://a/b", "it is down")

    def file(name: str) -> RemoteFile:
        return RemoteFile("https://a/b", name, f"https://a/b/{name}", 10, lambda _, headers: headers)

    before = asyncio.all_tasks()
    with pytest.raises(SourceUnreachable):
        await remote.look(Broken(), None, "https://a/b", file, Limits().files)  # type: ignore[arg-type]
    assert asyncio.all_tasks() == before


# TLS


def certificate_for_loopback(folder: Path) -> Path:
    """A certificate and its key in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "loopback")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now, now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    file = folder / "loopback.pem"
    file.write_bytes(private + made.public_bytes(serialization.Encoding.PEM))
    return file


async def test_a_server_must_prove_who_it_is(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = certificate_for_loopback(tmp_path)
    with serving(Web(), certificate=file) as server:
        server.put(adapter, "/a")
        async with web_source(tmp_path, PATIENT) as sources:
            with pytest.raises(SourceUnreachable, match="CERTIFICATE_VERIFY_FAILED"):
                await sources.look(f"{server.url}/a")
        monkeypatch.setenv("SSL_CERT_FILE", str(file))
        async with web_source(tmp_path, PATIENT) as sources:
            assert same(await read(sources, f"{server.url}/a"), adapter)
            # The name that is asked for must be the certificate's, not only the address behind it.
            with pytest.raises(SourceUnreachable, match="CERTIFICATE_VERIFY_FAILED"):
                await sources.look(f"{server.url.replace('127.0.0.1', 'localhost')}/a")


async def test_a_handshake_that_takes_too_long_leaves_no_connection_open(tmp_path: Path) -> None:
    open_connections = asyncio.Semaphore(0)

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        open_connections.release()
        await reader.read()
        await open_connections.acquire()
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    async with server, web_source(tmp_path, QUICK) as sources:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(SourceTooSlow):
            await sources.look(f"https://127.0.0.1:{port}/a")
        async with asyncio.timeout(5):
            while not open_connections.locked():  # noqa: ASYNC110 - the other side's doing
                await asyncio.sleep(0.01)
