"""Linear layers are joined by what they read, and compute what they computed before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
import torch

from engine.linear import STORAGES, ActiveAdapters, fastest_storage, install
from tests.engine.harness import tiny_base


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_every_storage_multiplies_alike(storage: str, rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(48, 20, generator=generator), torch.randn(48, generator=generator)
    x = torch.randn(rows, 20, generator=generator)
    for given in (bias, None):
        expected = torch.nn.functional.linear(x, weight, given)
        torch.testing.assert_close(STORAGES[storage](weight, given)(x), expected, rtol=1e-5, atol=1e-5)


def test_the_fastest_storage_is_one_of_those_timed() -> None:
    name, seconds = fastest_storage(torch.randn(64, 32))
    assert name in seconds and seconds[name] == min(seconds.values()) > 0


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]),
        ("gpt_neox", [("query_key_value",), ("dense",), ("dense_h_to_4h",), ("dense_4h_to_h",)]),
        ("gpt2", [("c_attn",), ("c_proj",), ("c_fc",), ("c_proj",)]),
    ],
)
def test_layers_that_read_the_same_input_are_one_projection(
    family: str, expected: list[tuple[str, ...]], tiny_model: Callable[[str], Path]
) -> None:
    base = tiny_base(tiny_model(family))
    names = [tuple(t.name.rpartition(".")[2] for t in projection.targets) for projection in base.projections]
    assert names == expected * 3
    assert [t for projection in base.projections for t in projection.targets] == list(base.targets)


class Branches(torch.nn.Module):
    """Two layers, each of them a list of two linear layers: two lists of the length by which the decoder is found."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(
            torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(2)) for _ in range(2)
        )

    def get_output_embeddings(self) -> None:
        return None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = sum((branch(x) for branch in cast(torch.nn.ModuleList, layer)), torch.zeros_like(x))
        return x


@torch.inference_mode()
def test_a_layer_in_two_lists_is_one_target() -> None:
    model, x = Branches(), torch.randn(1, 5, 4)
    expected = model(x)
    targets, projections = install(model, 2, 5, lambda: model(x), ActiveAdapters())
    assert [target.name for target in targets] == ["layers.0.0", "layers.0.1", "layers.1.0", "layers.1.1"]
    assert [len(projection.targets) for projection in projections] == [2, 2]
    torch.testing.assert_close(model(x), expected)
