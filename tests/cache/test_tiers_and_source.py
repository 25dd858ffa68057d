"""Files: whole or not at all, checked when read, and nothing outside the roots."""

from __future__ import annotations

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cache.errors import ArtifactDamaged, MalformedAdapter, SourceNotFound, TierFailed, TierFull
from cache.sources import FileSource, scheme_of
from cache.tiers import ArtifactKey, FileTier
from servicekit.errors import InvalidField, NotImplementedYet, StartupError
from tests.cache.conftest import write_adapter

A, B = ArtifactKey("a", "float32"), ArtifactKey("b", "float32")


def test_what_was_written_is_found_by_the_next_start(tmp_path: Path) -> None:
    tier = FileTier("disk", tmp_path / "disk", 1000)
    assert tier.write(ArtifactKey("d" * 64, "float32"), b"x" * 100) == 100
    assert FileTier("disk", tmp_path / "disk", 1000).sizes() == {ArtifactKey("d" * 64, "float32"): 100}


def test_half_written_files_are_never_found(tmp_path: Path) -> None:
    tier = FileTier("disk", tmp_path / "disk", 1000)
    tier.write(A, b"x")
    (tier.folder / "b.float32.safetensors.123.unfinished").write_bytes(b"half")
    (tier.folder / "c.float32.safetensors").write_bytes(b"no checksum")
    (tier.folder / "d.float32.safetensors.sha256").write_text("no file")
    assert tier.sizes() == {A: 1}
    assert sorted(path.name for path in tier.folder.iterdir()) == [
        "a.float32.safetensors",
        "a.float32.safetensors.sha256",
    ]


def test_a_damaged_file_is_removed_instead_of_copied(tmp_path: Path) -> None:
    disk, host = FileTier("disk", tmp_path / "disk", 1000), FileTier("host", tmp_path / "host", 1000)
    disk.write(A, b"right")
    disk.path(A).write_bytes(b"wrong")
    with pytest.raises(ArtifactDamaged):
        host.copy_from(disk, A)
    assert not disk.sizes() and not host.sizes()


def test_a_budget_is_a_budget(tmp_path: Path) -> None:
    tier = FileTier("disk", tmp_path / "disk", 150)
    tier.write(A, b"x" * 100)
    with pytest.raises(TierFull, match="60 bytes are needed, 50 are free"):
        tier.write(B, b"x" * 60)
    tier.remove(A)
    tier.write(B, b"x" * 60)


@pytest.fixture
def source(tmp_path: Path) -> FileSource:
    (tmp_path / "root").mkdir()
    write_adapter(tmp_path / "outside")
    return FileSource([tmp_path / "root"], 1 << 20)


def test_an_adapter_under_a_root_is_read(source: FileSource, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "root" / "deep" / "an adapter")
    files = source.read(f"file://{tmp_path}/root/deep/an%20adapter")
    assert files.config == (folder / "adapter_config.json").read_bytes()
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert source.read(f"file://{folder}").chat_template == "{{ messages }}"


def test_nothing_outside_the_roots_is_read_or_told(source: FileSource, tmp_path: Path) -> None:
    (tmp_path / "root" / "link").symlink_to(tmp_path / "outside")
    (tmp_path / "root-not").mkdir()
    for path in (
        "outside",
        "root/../outside",
        "root/link",
        "root-not",
        "nowhere",
        "root/%2e%2e/outside",
        "root/link/x",
    ):
        with pytest.raises(InvalidField) as refused:
            source.read(f"file://{tmp_path}/{path}")
        assert refused.value.reason == "OUTSIDE_ROOTS", path


def test_a_link_inside_the_root_may_point_inside_the_root(source: FileSource, tmp_path: Path) -> None:
    write_adapter(tmp_path / "root" / "v2")
    (tmp_path / "root" / "latest").symlink_to("v2")
    assert source.read(f"file://{tmp_path}/root/latest").weights


def test_files_that_are_links_fifos_or_too_large_are_refused(source: FileSource, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "root" / "a")
    weights = folder / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    weights.symlink_to(tmp_path / "outside" / "adapter_model.safetensors")
    with pytest.raises(MalformedAdapter, match="symbolic link out of the allowed roots"):
        source.read(f"file://{folder}")
    weights.unlink()
    os.mkfifo(weights)
    with pytest.raises(MalformedAdapter, match="regular file"):
        source.read(f"file://{folder}")
    weights.unlink()
    weights.write_bytes(content + b"x" * (1 << 20))
    with pytest.raises(MalformedAdapter, match="the limit is 1048576"):
        source.read(f"file://{folder}")
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(MalformedAdapter, match="pickle") as refused:
        source.read(f"file://{folder}")
    assert refused.value.reason == "PICKLE_REFUSED"
    (folder / "adapter_config.json").unlink()
    with pytest.raises(MalformedAdapter, match=r"adapter_config.json: is missing"):
        source.read(f"file://{folder}")


def test_missing_and_malformed_sources(source: FileSource, tmp_path: Path) -> None:
    with pytest.raises(SourceNotFound):
        source.read(f"file://{tmp_path}/root/nothing")
    (tmp_path / "root" / "file").write_text("")
    with pytest.raises(InvalidField, match="not a folder"):
        source.read(f"file://{tmp_path}/root/file")
    for uri in ("file://relative", "file://host/path", "file:///a%00b"):
        with pytest.raises(InvalidField):
            source.read(uri)
    for uri in ("hf://a/b", "s3://a/b", "https://a/b"):
        with pytest.raises(NotImplementedYet, match=uri[:2]):
            scheme_of(uri, ("file",))
    for uri in ("", "x", "ftp://x", "file://" + "x" * 3000):
        with pytest.raises(InvalidField):
            scheme_of(uri)


def test_writers_at_once_stay_within_the_budget_together(tmp_path: Path) -> None:
    tier = FileTier("disk", tmp_path / "disk", 1000)
    outcomes: list[bool] = []

    def write(number: int) -> None:
        try:
            outcomes.append(tier.write(ArtifactKey(f"k{number}", "float32"), b"x" * 300) == 300)
        except TierFull:
            outcomes.append(False)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(write, range(16)))
    assert sum(outcomes) == 3 and sum(tier.sizes().values()) == 900


@pytest.mark.parametrize("number, error", [(errno.ENOSPC, TierFull), (errno.EIO, TierFailed)])
def test_a_write_that_fails_leaves_nothing_and_takes_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, error: type[Exception]
) -> None:
    tier = FileTier("disk", tmp_path / "disk", 100)

    def fail(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(error):
        tier.write(A, b"x" * 100)
    monkeypatch.undo()
    assert not list(tier.folder.iterdir())
    assert tier.write(A, b"x" * 100) == 100


def test_a_folder_that_is_not_ours_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "theirs")
    with pytest.raises(StartupError, match="not a folder of this user"):
        FileTier("host", tmp_path / "link", 100)
    tier = FileTier("host", tmp_path / "theirs", 100)
    assert tier.folder.stat().st_mode & 0o777 == 0o700


def test_a_folder_of_links_within_the_roots_is_read(source: FileSource, tmp_path: Path) -> None:
    """As the Hugging Face cache lays its snapshots out."""
    write_adapter(tmp_path / "root" / "blobs")
    snapshot = tmp_path / "root" / "snapshots" / "v1"
    snapshot.mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    assert source.read(f"file://{snapshot}") == source.read(f"file://{tmp_path}/root/blobs")


def test_a_part_of_the_path_swapped_for_a_link_is_not_followed(
    source: FileSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_adapter(tmp_path / "root" / "deep" / "a")
    write_adapter(tmp_path / "outside" / "a")
    resolve = Path.resolve

    def resolve_then_swap(path: Path, strict: bool = False) -> Path:
        found = resolve(path, strict)
        if path.name == "adapter_config.json" and not (tmp_path / "root" / "deep").is_symlink():
            (tmp_path / "root" / "deep").rename(tmp_path / "root" / "before")
            (tmp_path / "root" / "deep").symlink_to(tmp_path / "outside")
        return found

    monkeypatch.setattr(Path, "resolve", resolve_then_swap)
    with pytest.raises(MalformedAdapter, match="changed meanwhile"):
        source.read(f"file://{folder}")
