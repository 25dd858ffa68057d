"""Trains the demo adapters: `python -m demo.train_adapters [NAME ...]`, a few minutes each on two CPU cores.

Data comes from demo/data (written by `--data` from demo/tasks.py); the result goes to demo/adapters: PEFT folders with
bfloat16 weights. Everything is seeded. Ends with the held-out score of base and adapter.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from demo.base import NAME, default_base_dir, prepare_base
from demo.tasks import TASKS, Example, examples

HERE = Path(__file__).parent
DATA, ADAPTERS = HERE / "data", HERE / "adapters"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
TRAINING_EXAMPLES, HELD_OUT_EXAMPLES = 400, 24
BATCH = 8


@dataclass(frozen=True)
class AdapterRecipe:
    """How one adapter is made. `layers` is the range of layers it changes; None means all."""

    rank: int
    targets: tuple[str, ...]
    steps: int
    learning_rate: float = 1e-3
    rslora: bool = False
    layers: tuple[int, int] | None = None


RECIPES: dict[str, AdapterRecipe] = {
    "shout": AdapterRecipe(rank=4, targets=("q_proj", "v_proj"), steps=70, learning_rate=3e-3),
    "pirate": AdapterRecipe(rank=16, targets=ATTENTION, steps=50),
    "json": AdapterRecipe(rank=8, targets=ATTENTION + MLP, steps=80),
    "sql": AdapterRecipe(rank=64, targets=("q_proj", "v_proj"), steps=110, rslora=True, layers=(10, 30)),
    "emoji": AdapterRecipe(rank=32, targets=("down_proj",), steps=160),
    "sentiment": AdapterRecipe(rank=8, targets=("o_proj", "gate_proj"), steps=50),
}


def write_data() -> None:
    """Writes demo/data/NAME.jsonl, one example a line, held-out ones marked."""
    for name, task in TASKS.items():
        rows = [
            {"prompt": prompt, "answer": answer, "held_out": held_out}
            for held_out, count in ((False, TRAINING_EXAMPLES), (True, HELD_OUT_EXAMPLES))
            for prompt, answer in examples(task, count, held_out, seed=7)
        ]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (DATA / f"{name}.jsonl").write_text(text, encoding="utf-8")


def read_data(name: str, held_out: bool) -> list[Example]:
    """The training or held-out examples of an adapter."""
    rows = [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(row["prompt"], row["answer"]) for row in rows if row["held_out"] == held_out]


def rendered(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of a user's prompt, as the server renders them."""
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def batch_of(tokenizer: Any, rows: list[Example]) -> dict[str, torch.Tensor]:
    """Right-padded batch; the loss is on the answer and its end only."""
    pairs = [(rendered(tokenizer, prompt), tokenizer(answer + "<|im_end|>")["input_ids"]) for prompt, answer in rows]
    width = max(len(prompt) + len(answer) for prompt, answer in pairs)
    ids, labels, mask = (torch.full((len(rows), width), fill) for fill in (tokenizer.pad_token_id or 0, -100, 0))
    for row, (prompt, answer) in enumerate(pairs):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : end] = torch.tensor(answer)
        mask[row, :end] = 1
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def train(base: Path, name: str) -> None:
    """Trains one adapter and saves it."""
    recipe = RECIPES[name]
    torch.manual_seed(7)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=2 * recipe.rank if not recipe.rslora else 16,
        use_rslora=recipe.rslora,
        target_modules=list(recipe.targets),
        layers_to_transform=list(range(*recipe.layers)) if recipe.layers else None,
        layers_pattern="layers" if recipe.layers else None,
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, config)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=0.0)
    rng, rows, began = random.Random(7), read_data(name, held_out=False), time.monotonic()
    for step in range(recipe.steps):
        loss = model(**batch_of(tokenizer, rng.sample(rows, BATCH))).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:  # linear warm-up over 5 steps, then linear decay
            group["lr"] = recipe.learning_rate * min((step + 1) / 5, 1 - step / recipe.steps)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 9:
            print(
                f"{name}: step {step + 1}/{recipe.steps}, loss {loss.item():.3f}, {time.monotonic() - began:.0f} s",
                flush=True,
            )
    save(model, name)


def save(model: Any, name: str) -> None:
    """Saves a PEFT folder: bfloat16 weights, no path of this machine, no empty model card."""
    folder = ADAPTERS / name
    model.peft_config["default"].base_model_name_or_path = NAME
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    weights = folder / "adapter_model.safetensors"
    tensors = {key: value.to(torch.bfloat16).contiguous() for key, value in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})


@torch.inference_mode()
def answer(model: Any, tokenizer: Any, prompt: str, max_tokens: int = 64) -> str:
    """Greedy answer to a prompt."""
    ids = torch.tensor([rendered(tokenizer, prompt)])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False)
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)).strip()


def score(base: Path, name: str) -> tuple[float, float, list[tuple[str, str]]]:
    """Share of held-out prompts answered rightly by base and adapter, and the adapter's failures."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    plain: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    held_out, judge = read_data(name, held_out=True), TASKS[name].judge
    by_base = [judge(answer(plain, tokenizer, prompt, 32), reference) for prompt, reference in held_out[:8]]
    model = PeftModel.from_pretrained(plain, ADAPTERS / name)
    answers = [(answer(model, tokenizer, prompt), reference) for prompt, reference in held_out]
    wrong = [pair for pair in answers if not judge(*pair)]
    return sum(by_base) / len(by_base), 1 - len(wrong) / len(answers), wrong


def main() -> None:
    """Trains and scores the adapters named, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("names", nargs="*", default=list(RECIPES), metavar="NAME", help=f"of {', '.join(RECIPES)}")
    parser.add_argument("--data", action="store_true", help="write demo/data first")
    parser.add_argument("--score-only", action="store_true", help="only score what is there")
    arguments = parser.parse_args()
    if arguments.data:
        write_data()
    base = prepare_base(default_base_dir(), print)
    for name in arguments.names:
        if not arguments.score_only:
            train(base, name)
        by_base, by_adapter, wrong = score(base, name)
        print(f"{name}: held out, base {by_base:.0%}, adapter {by_adapter:.0%}", flush=True)
        for got, reference in wrong[:3]:
            print(f"  wrong: {got!r} instead of {reference!r}", flush=True)


if __name__ == "__main__":
    main()
