"""Adapters as rows on real tiny models, the kernels' work done by their references, against PEFT."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from engine.errors import BadArtifact, DeviceFull, StaleRows
from engine.lora import DeviceSegment
from engine.messages import Evict, Evicted, Install, Loaded, LoadFailed
from engine.rank_step import RankedAdapter
from tests.engine.harness import InProcess, request
from tests.engine.tiny import Oracle, TinyAdapter, four_adapters, make_adapter, make_model, write_artifact
from tests.kernels.lora.served import logits, read, torch_kernels, with_rows

__all__ = ["torch_kernels"]
pytestmark = pytest.mark.usefixtures("torch_kernels")

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROMPT = [5, 80, 33, 7]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = make_model(tmp_path_factory.mktemp("models") / f"tiny-{family}", family)
        return made[family]

    return get


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "deepseek_v3"])
def test_answers_of_mixed_adapters_are_those_of_peft(
    family: str, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    adapters = four_adapters(folder(family), tmp_path, family)
    oracle = Oracle(folder(family), adapters)
    base, store = with_rows(folder(family))
    held = [read(base, store, adapter) for adapter in adapters]
    prompts = [(PROMPT, None), *((PROMPT[: 1 + place], one) for place, one in enumerate(held)), (PROMPT * 4, held[3])]
    for (prompt, adapter), found in zip(prompts, logits(base, prompts), strict=True):
        right = oracle.logits(prompt, adapter.digest if adapter else "")[-1]
        torch.testing.assert_close(found, right, rtol=1e-3, atol=1e-3 * float(right.abs().max()))


def test_a_layer_has_four_pairs_of_launches_at_most_and_none_without_adapters(
    folder: Callable[[str], Path], tmp_path: Path, torch_kernels: list[str]
) -> None:
    base, store = with_rows(folder("llama"))
    layers = 3
    whole = read(base, store, make_adapter(folder("llama"), tmp_path, "all", 5, ALL))
    some = read(base, store, make_adapter(folder("llama"), tmp_path, "some", 9, ["q_proj", "v_proj"]))
    # One copy of a layer is placed by one launch.
    assert torch_kernels == ["place"] * (2 * layers)

    def launches(*adapters: RankedAdapter | None) -> Counter[str]:
        torch_kernels.clear()
        logits(base, [(PROMPT[: 1 + place], adapter) for place, adapter in enumerate(adapters)])
        return Counter(torch_kernels)

    assert launches(None, None) == {}
    assert launches(whole, None, some) == launches(whole) == {"shrink": 4 * layers, "expand": 4 * layers}
    assert launches(some, None) == {"shrink": layers, "expand": layers}


def test_an_adapter_of_some_layers_and_several_ranks_is_served_as_it_is(
    folder: Callable[[str], Path], tmp_path: Path
) -> None:
    tensors: dict[str, torch.Tensor] = {}
    generator = torch.Generator().manual_seed(3)
    for layer, rank in ((0, 2), (2, 11)):
        for target, size in (("self_attn.q_proj", (48, 48)), ("mlp.down_proj", (80, 48))):
            name = f"model.layers.{layer}.{target}"
            tensors[f"{name}.A"] = torch.randn(rank, size[0], generator=generator)
            tensors[f"{name}.B"] = torch.randn(size[1], rank, generator=generator)
    path = write_artifact(tmp_path / "odd.safetensors", tensors, "d" * 64, 11)
    base, store = with_rows(folder("llama"))
    before = store.free_bytes
    held = read(base, store, TinyAdapter("odd", "d" * 64, tmp_path, path))
    assert before - store.free_bytes == held.size_bytes
    model: Any = AutoModelForCausalLM.from_pretrained(folder("llama"), attn_implementation="eager")
    with torch.no_grad():
        for name in {key[:-2] for key in tensors}:
            model.get_submodule(name).weight += tensors[f"{name}.B"] @ tensors[f"{name}.A"]
        right = model(torch.tensor([PROMPT])).logits[0, -1]
    (found,) = logits(base, [(PROMPT, held)])
    torch.testing.assert_close(found, right, rtol=1e-3, atol=1e-3 * float(right.abs().max()))


def test_whatever_comes_and_goes_the_last_row_is_used_and_answers_stay_right(
    folder: Callable[[str], Path], tmp_path: Path
) -> None:
    choices = random.Random(4)
    made = [
        make_adapter(folder("llama"), tmp_path, f"a{rank}", rank, ALL[: 1 + rank % 7]) for rank in (1, 2, 3, 5, 9, 14)
    ]
    oracle = Oracle(folder("llama"), made)
    right = {adapter.digest: oracle.logits(PROMPT, adapter.digest)[-1] for adapter in made}
    base, store = with_rows(folder("llama"), 300_000)
    held: list[RankedAdapter] = []
    refused = scattered = 0
    for _ in range(120):
        chosen = choices.choice(made)
        free = store.free_bytes
        try:
            held.append(read(base, store, chosen))
        except DeviceFull as error:
            refused += 1
            # Refused only when the rows are not there, and with nothing changed.
            assert int(error.metadata["needed_bytes"]) > int(error.metadata["free_bytes"]) == free == store.free_bytes
            for _ in range(2):
                held.pop(choices.randrange(len(held))).release()
        scattered += any(rows.is_scattered for rows in held[-1].rows if rows)
        for arena in store.arenas:
            arena.pool.check_integrity()
    assert refused > 5 and scattered > 5
    for adapter in held:
        (found,) = logits(base, [(PROMPT, adapter)])
        torch.testing.assert_close(found, right[adapter.digest], rtol=1e-3, atol=1e-2)


def test_rows_that_are_another_adapters_now_fail_the_step_loudly(folder: Callable[[str], Path], tmp_path: Path) -> None:
    base, store = with_rows(folder("llama"))
    adapter = make_adapter(folder("llama"), tmp_path, "one", 4, ALL)
    old = read(base, store, adapter)
    segment = DeviceSegment(0, 2, old)
    (step,) = store.arrange([segment])
    old.release()
    with pytest.raises(StaleRows):
        store.arrange([segment])
    read(base, store, adapter)
    with pytest.raises(StaleRows) as caught:
        store.arrange([segment])
    assert caught.value.digest == adapter.digest
    assert step.works


def test_the_same_step_again_uploads_nothing_and_a_larger_bucket_changes_nothing(
    folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, store = with_rows(folder("llama"))
    held = [read(base, store, make_adapter(folder("llama"), tmp_path, f"a{rank}", rank, ALL)) for rank in (3, 6)]
    uploads: list[int] = []
    upload = store._upload

    def counted(numbers: Any, to: torch.Tensor) -> None:
        uploads.append(len(numbers))
        upload(numbers, to)

    monkeypatch.setattr(store, "_upload", counted)
    segments = [DeviceSegment(0, 1, held[0]), DeviceSegment(1, 3, held[1])]
    (first,) = store.arrange(segments)
    (again,) = store.arrange(list(segments))
    assert len(uploads) == 1 and first.works == again.works
    pointers = [work.expand.data_ptr() for work in first.works if work]
    (other,) = store.arrange([DeviceSegment(0, 1, held[1]), DeviceSegment(1, 3, held[0])])
    assert len(uploads) == 2
    assert [work.expand.data_ptr() for work in other.works if work] == pointers, "graphs rely on it"

    x, y = torch.randn(4, 48), torch.zeros(2, 4, 96)
    exact = store.bucket(segments)
    larger = type(exact)(exact.form, exact.tiles * 4, exact.shrinks * 3, exact.touched)
    for out, bucket in zip(y, (exact, larger), strict=True):
        store.prepare(segments, bucket).add(0, x, out)
    assert torch.equal(y[0], y[1]) and y[0][:3].any() and not y[0][3].any()


def test_the_loop_frees_the_rows_of_what_goes_and_of_what_was_not_taken(
    folder: Callable[[str], Path], tmp_path: Path
) -> None:
    adapter = make_adapter(folder("llama"), tmp_path, "one", 4, ALL)
    oracle = Oracle(folder("llama"), [adapter])
    base, store = with_rows(folder("llama"))
    empty = store.free_bytes
    with InProcess(base) as engine:
        first, second = (read(base, store, adapter) for _ in range(2))
        engine.loop.post(Install(first))
        engine.loop.post(Install(second))
        (answer,) = engine.run(request(PROMPT, adapter.digest, max_output_tokens=5))
        assert answer.token_ids == oracle.greedy(PROMPT, 5, adapter.digest)
        assert store.free_bytes == empty - first.size_bytes, "the second copy was given back"
        engine.loop.post(Evict(adapter.digest, False))
        engine.run(request(PROMPT, max_output_tokens=1))
        assert store.free_bytes == empty
        assert engine.reports.count(Loaded(adapter.digest, first.size_bytes)) == 2
        assert Evicted(adapter.digest, True) in engine.reports
        engine.loop._rows.budget_bytes = 10
        engine.loop.post(Install(read(base, store, adapter)))
        engine.run(request(PROMPT, max_output_tokens=1))
        assert store.free_bytes == empty
        assert any(isinstance(report, LoadFailed) for report in engine.reports)


def tensors(rank: int = 2, name: str = "model.layers.0.self_attn.q_proj", out: int = 48) -> dict[str, torch.Tensor]:
    return {f"{name}.A": torch.ones(rank, 48), f"{name}.B": torch.ones(out, rank)}


@pytest.mark.parametrize(
    ("content", "metadata", "says"),
    [
        (tensors(), {"digest": "e" * 64}, "another version"),
        (tensors(), {"format": "pickle"}, "format"),
        ({"model.layers.0.self_attn.q_proj.A": torch.ones(2, 48)}, {}, "half a pair"),
        (tensors(name="model.layers.9.self_attn.q_proj"), {}, "no target module"),
        (tensors(out=47), {}, "do not fit"),
        (tensors(rank=513), {}, "rank 513, the limit is 512"),
        ({key: value.half() for key, value in tensors().items()}, {}, "float16"),
        ({key: value.int() for key, value in tensors().items()}, {}, "where this engine runs"),
        ({}, {}, "no tensors"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    folder: Callable[[str], Path], tmp_path: Path, content: dict[str, torch.Tensor], metadata: dict[str, str], says: str
) -> None:
    base, store = with_rows(folder("llama"))
    path = tmp_path / "artifact.safetensors"
    save_file(content, path, metadata={"digest": "d" * 64, "format": "loraplex-artifact-1", "rank": "2"} | metadata)
    free = store.free_bytes
    with pytest.raises(BadArtifact, match=says):
        read(base, store, TinyAdapter("bad", "d" * 64, tmp_path, path))
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(BadArtifact):
        read(base, store, TinyAdapter("bad", "d" * 64, tmp_path, path))
    assert store.free_bytes == free


def test_a_load_that_fails_half_way_gives_its_rows_back(
    folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, store = with_rows(folder("llama"))
    adapter = make_adapter(folder("llama"), tmp_path, "one", 4, ALL)
    free = store.free_bytes
    with monkeypatch.context() as patch:
        patch.setattr("engine.kernels.lora.launch.place", None)
        with pytest.raises(TypeError):
            read(base, store, adapter)
    assert store.free_bytes == free
    read(base, store, adapter)
