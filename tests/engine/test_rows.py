from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from engine.errors import BadArtifact, DeviceFull, StaleRows
from engine.lora import DeviceAdapter, Projection, TargetModule
from engine.rows import AdapterRows, ArtifactReader

PROJECTIONS = (Projection((TargetModule("layers.0.q", 6, 4), TargetModule("layers.0.v", 6, 2))),)
DIGEST = "d" * 64


def reader(root: Path, max_rank: int = 8) -> ArtifactReader:
    return ArtifactReader(str(root), PROJECTIONS, torch.float32, torch.device("cpu"), max_rank)


def tensors(rank: int = 2, name: str = "layers.0.q", out: int = 4) -> dict[str, torch.Tensor]:
    return {f"{name}.A": torch.ones(rank, 6), f"{name}.B": torch.ones(out, rank)}


def write(root: Path, content: dict[str, torch.Tensor], **metadata: str) -> str:
    path = root / "artifact.safetensors"
    save_file(content, path, metadata={"digest": DIGEST, "format": "loraplex-artifact-1", "rank": "2"} | metadata)
    return str(path)


def test_an_artifact_becomes_a_delta_by_projection(tmp_path: Path) -> None:
    both = tensors(3) | tensors(2, "layers.0.v", 2)
    adapter = reader(tmp_path).read(DIGEST, write(tmp_path, both))
    (delta,) = adapter.deltas
    assert delta is not None and delta.a.shape == (5, 6)
    assert [(part.ranks, part.columns) for part in delta.parts] == [
        (slice(0, 3), slice(0, 4)),
        (slice(3, 5), slice(4, 6)),
    ]
    assert [part.b.shape for part in delta.parts] == [(3, 4), (2, 2)]
    assert adapter.size_bytes == (3 * 6 + 4 * 3 + 2 * 6 + 2 * 2) * 4


def test_an_adapter_outlives_its_file(tmp_path: Path) -> None:
    path = write(tmp_path, tensors())
    adapter = reader(tmp_path).read(DIGEST, path)
    Path(path).write_bytes(b"")
    (delta,) = adapter.deltas
    assert delta is not None and float(delta.a.sum()) == 12


def test_adapters_of_one_shape_come_each_with_their_own_numbers(tmp_path: Path) -> None:
    one = reader(tmp_path)
    for seed, rank in ((0, 2), (1, 2), (2, 3), (3, 2)):
        torch.manual_seed(seed)
        given = {name: torch.randn_like(value) for name, value in (tensors(rank) | tensors(1, "layers.0.v", 2)).items()}
        (delta,) = one.read(DIGEST, write(tmp_path, given)).deltas
        # Joined and turned one by one
        assert delta is not None
        assert delta.a.equal(torch.cat([given["layers.0.q.A"], given["layers.0.v.A"]]))
        assert delta.parts[0].b.equal(given["layers.0.q.B"].t()) and delta.parts[1].b.equal(given["layers.0.v.B"].t())


def test_what_is_wrong_with_an_artifact_shows_also_when_its_shape_is_known(tmp_path: Path) -> None:
    one = reader(tmp_path)
    path = write(tmp_path, tensors())
    one.read(DIGEST, path)
    with pytest.raises(BadArtifact, match="another version"):
        one.read("e" * 64, path)
    whole = Path(path).read_bytes()
    for content in (whole[:-4], whole + bytes(4), whole[:9], b""):
        Path(path).write_bytes(content)
        with pytest.raises(BadArtifact):
            one.read(DIGEST, path)


@pytest.mark.parametrize(
    ("content", "metadata", "says"),
    [
        (tensors(), {"digest": "e" * 64}, "another version"),
        (tensors(), {"format": "pickle"}, "format"),
        ({"layers.0.q.A": torch.ones(2, 6)}, {}, "half a pair"),
        (tensors(name="layers.9.q"), {}, "no target module"),
        (tensors(out=5), {}, "do not fit"),
        (tensors(rank=9), {}, "rank 9, the limit is 8"),
        ({key: value.half() for key, value in tensors().items()}, {}, "float16"),
        ({}, {}, "no tensors"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    tmp_path: Path, content: dict[str, torch.Tensor], metadata: dict[str, str], says: str
) -> None:
    with pytest.raises(BadArtifact, match=says):
        reader(tmp_path).read(DIGEST, write(tmp_path, content, **metadata))


def test_files_outside_of_the_host_tier_are_refused_also_through_links(tmp_path: Path) -> None:
    outside, root = tmp_path / "outside", tmp_path / "root"
    outside.mkdir()
    root.mkdir()
    path = write(outside, tensors())
    link = root / "link.safetensors"
    link.symlink_to(path)
    for tried in (path, str(link), str(root / ".." / "outside" / "artifact.safetensors")):
        with pytest.raises(BadArtifact, match="outside"):
            reader(root).read(DIGEST, tried)


def test_a_missing_or_truncated_file_is_refused(tmp_path: Path) -> None:
    path = Path(write(tmp_path, tensors()))
    path.write_bytes(path.read_bytes()[:-3])
    for tried in (path, tmp_path / "missing"):
        with pytest.raises(BadArtifact, match="cannot be read"):
            reader(tmp_path).read(DIGEST, str(tried))


def adapter(digest: str, size: int) -> DeviceAdapter:
    return DeviceAdapter(digest, (None,), size)


def test_the_budget_is_kept_and_a_refusal_changes_nothing() -> None:
    rows = AdapterRows(100)
    rows.install(adapter("a", 60))
    with pytest.raises(DeviceFull) as caught:
        rows.install(adapter("b", 41))
    assert caught.value.metadata == {"needed_bytes": "41", "free_bytes": "40", "budget_bytes": "100"}
    assert rows.digests == ("a",) and rows.used_bytes == 60
    rows.evict("a")
    rows.install(adapter("b", 41))
    assert rows.used_bytes == 41


def test_an_adapter_in_use_cannot_be_evicted() -> None:
    rows = AdapterRows(100)
    rows.install(adapter("a", 60))
    generation = rows.acquire("a")
    assert not rows.can_evict("a")
    rows.release("a", generation)
    assert rows.can_evict("a") and rows.can_evict("unknown")


def test_rows_of_another_generation_are_never_handed_out() -> None:
    rows = AdapterRows(100)
    rows.install(adapter("a", 60))
    generation = rows.acquire("a")
    rows.release("a", generation)
    rows.evict("a")
    with pytest.raises(StaleRows):
        rows.adapter("a", generation)
    rows.install(adapter("a", 60))
    with pytest.raises(StaleRows) as caught:
        rows.adapter("a", generation)
    assert caught.value.metadata["expected"] == str(generation)
    assert rows.adapter("a", rows.acquire("a")).digest == "a"
