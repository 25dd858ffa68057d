"""The demo adapters on disk: what catalog, recipes and files say of one another, and that they do what they are for."""

from __future__ import annotations

import json
import re
import struct
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from demo.base import NAME, default_base_dir, prepare_base
from demo.catalog import ADAPTERS, DemoAdapter, load_catalog
from demo.tasks import TASKS
from demo.train_adapters import DATA, RECIPES, read_data, rendered

CATALOG = load_catalog()
BIGGEST_BYTES, BIGGEST_ALL_BYTES = 5_000_000, 20_000_000
every_adapter = pytest.mark.parametrize("entry", CATALOG.adapters, ids=lambda entry: entry.id)


def config_of(entry: DemoAdapter) -> dict[str, Any]:
    return dict(json.loads((entry.folder / "adapter_config.json").read_text(encoding="utf-8")))


def header_of(entry: DemoAdapter) -> dict[str, Any]:
    with (entry.folder / "adapter_model.safetensors").open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return dict(json.loads(file.read(length)))


def test_catalog_recipes_tasks_data_and_folders_name_the_same_adapters() -> None:
    names = [entry.id for entry in CATALOG.adapters]
    assert len(set(names)) == len(names)
    assert set(names) == set(RECIPES) == set(TASKS)
    assert set(names) == {folder.name for folder in ADAPTERS.iterdir()} == {file.stem for file in DATA.glob("*.jsonl")}


def test_adapters_differ_in_rank_and_targets() -> None:
    ranks = [entry.rank for entry in CATALOG.adapters]
    assert min(ranks) == 4 and max(ranks) == 64
    assert len({frozenset(entry.targets) for entry in CATALOG.adapters}) >= 4
    assert any(entry.rslora for entry in CATALOG.adapters)


@every_adapter
def test_catalog_recipe_and_config_agree(entry: DemoAdapter) -> None:
    config, recipe = config_of(entry), RECIPES[entry.id]
    assert config["r"] == entry.rank == recipe.rank
    assert set(config["target_modules"]) == set(entry.targets) == set(recipe.targets)
    assert config["use_rslora"] == entry.rslora == recipe.rslora
    assert config["layers_to_transform"] == (list(range(*recipe.layers)) if recipe.layers else None)
    assert config["base_model_name_or_path"] == NAME


@every_adapter
def test_an_adapter_holds_only_low_rank_factors(entry: DemoAdapter) -> None:
    config, header = config_of(entry), header_of(entry)
    assert config["peft_type"] == "LORA" and config["bias"] == "none"
    assert not config["use_dora"] and not config["modules_to_save"]
    assert header.pop("__metadata__") == {"format": "pt"}
    for name, tensor in header.items():
        match = re.search(r"\.(\w+)\.lora_([AB])\.weight$", name)
        assert match and match[1] in entry.targets, name
        assert tensor["dtype"] == "BF16" and tensor["shape"][match[2] == "B"] == entry.rank


@every_adapter
def test_a_folder_is_small_and_free_of_this_machines_paths(entry: DemoAdapter) -> None:
    assert {file.name for file in entry.folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert sum(file.stat().st_size for file in entry.folder.iterdir()) <= BIGGEST_BYTES
    for value in config_of(entry).values():
        assert not (isinstance(value, str) and value.startswith(("/", "~", ".")))


def test_all_adapters_together_are_small() -> None:
    assert sum(file.stat().st_size for file in ADAPTERS.rglob("*") if file.is_file()) <= BIGGEST_ALL_BYTES


def test_every_entry_is_ready_to_be_shown() -> None:
    assert CATALOG.shared_prompt and len(set(CATALOG.base_oracle_prompts)) == 3
    for entry in CATALOG.adapters:
        assert entry.description and "\n" not in entry.description and entry.prompt and entry.expect
        assert len(set(entry.oracle_prompts)) == 3


@every_adapter
def test_what_is_held_out_is_not_trained_on(entry: DemoAdapter) -> None:
    training, held_out = read_data(entry.id, held_out=False), read_data(entry.id, held_out=True)
    assert len(training) >= 150 and len(held_out) >= 35
    assert not {prompt for prompt, _ in training} & {prompt for prompt, _ in held_out}
    assert entry.prompt not in {prompt for prompt, _ in training}
    assert all(TASKS[entry.id].judge(answer, answer) for _, answer in training + held_out)


@cache
def base_folder() -> Path:
    """The demo base where it is already prepared; a test does not spend half a minute and 540 MB on it unasked."""
    folder = default_base_dir()
    if not (folder / "model.safetensors").is_file():
        pytest.skip("the demo base is not prepared: run `python -m demo.base`")
    return prepare_base(folder, print)


def test_training_renders_prompts_as_chatml() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base_folder())
    assert tokenizer.decode(rendered(tokenizer, "Hello!")) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.filterwarnings("default")
def test_every_adapter_answers_its_own_prompt_and_the_base_does_not() -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from demo.train_adapters import answers

    tokenizer = AutoTokenizer.from_pretrained(base_folder())
    plain: Any = AutoModelForCausalLM.from_pretrained(base_folder(), dtype=torch.float32)
    by_base = answers(plain, tokenizer, [entry.prompt for entry in CATALOG.adapters])
    model: Any = None
    for entry, before in zip(CATALOG.adapters, by_base, strict=True):
        if model is None:
            model = PeftModel.from_pretrained(plain, entry.folder, adapter_name=entry.id)
        else:
            model.load_adapter(entry.folder, adapter_name=entry.id)
        model.set_adapter(entry.id)
        (after,) = answers(model, tokenizer, [entry.prompt])
        assert TASKS[entry.id].judge(after, entry.expect), (entry.id, after)
        assert not TASKS[entry.id].judge(before, entry.expect), (entry.id, before)
