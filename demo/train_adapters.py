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
TRAINING_EXAMPLES, HELD_OUT_EXAMPLES = 400, 40
BATCH = 8
IGNORED = -100
ANSWERS_AT_ONCE, MAX_ANSWER_TOKENS = 20, 56


@dataclass(frozen=True)
class AdapterRecipe:
    """How one adapter is made. `layers` is the range of layers it changes; None means all."""

    rank: int
    targets: tuple[str, ...]
    steps: int
    learning_rate: float = 1e-3
    rslora: bool = False
    layers: tuple[int, int] | None = None


@dataclass(frozen=True)
class Score:
    """Shares of the held-out prompts.

    Attributes:
        base, adapter: answered as the task's judge asks, without and with the adapter.
        verbatim: answered by the adapter with exactly the words of the reference.
        wrong: what the judge refused from the adapter, each with its reference.
    """

    base: float
    adapter: float
    verbatim: float
    wrong: tuple[Example, ...]


RECIPES: dict[str, AdapterRecipe] = {
    "shout": AdapterRecipe(rank=4, targets=ATTENTION + MLP, steps=260, learning_rate=2e-3),
    "pirate": AdapterRecipe(rank=16, targets=ATTENTION, steps=50),
    "json": AdapterRecipe(rank=8, targets=MLP, steps=40),
    "sql": AdapterRecipe(rank=64, targets=("q_proj", "v_proj"), steps=60, rslora=True, layers=(10, 30)),
    "emoji": AdapterRecipe(rank=32, targets=("down_proj",), steps=300, learning_rate=1.5e-3),
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


def batch_of(tokenizer: Any, rows: list[Example]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, labels and mask, padded at the right; labels are on the answer and its end only."""
    pairs = [
        (rendered(tokenizer, prompt), tokenizer(answer + "<|im_end|>", add_special_tokens=False)["input_ids"])
        for prompt, answer in rows
    ]
    width = max(len(prompt) + len(answer) for prompt, answer in pairs)
    ids, labels, mask = (torch.full((len(rows), width), fill) for fill in (tokenizer.pad_token_id, IGNORED, 0))
    for row, (prompt, answer) in enumerate(pairs):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : end] = torch.tensor(answer)
        mask[row, :end] = 1
    return ids, labels, mask


def loss_of(model: Any, ids: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of the labelled tokens."""
    # Logits are a third of the work with this vocabulary, so none are made before the first label.
    first = int((labels != IGNORED).any(dim=0).nonzero()[0])
    logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=ids.shape[1] - first + 1).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, first:].flatten(), ignore_index=IGNORED)


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
        loss = loss_of(model, *batch_of(tokenizer, rng.sample(rows, BATCH)))
        torch.autograd.backward(loss)
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
    model.save_pretrained(folder, save_embedding_layers=False)  # no adapter has any; "auto" would ask the hub
    (folder / "README.md").unlink(missing_ok=True)
    weights = folder / "adapter_model.safetensors"
    tensors = {key: value.to(torch.bfloat16).contiguous() for key, value in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # safetensors writes for the owner alone; a service of another user reads it too


@torch.inference_mode()
def answers(model: Any, tokenizer: Any, prompts: list[str]) -> list[str]:
    """Greedy answers to prompts, a padded batch at a time."""
    texts: list[str] = []
    for start in range(0, len(prompts), ANSWERS_AT_ONCE):
        rows = [rendered(tokenizer, prompt) for prompt in prompts[start : start + ANSWERS_AT_ONCE]]
        width = max(map(len, rows))
        ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        out = model.generate(ids, attention_mask=mask, max_new_tokens=MAX_ANSWER_TOKENS, do_sample=False)
        texts += [text.strip() for text in tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)]
    return texts


def score(base: Path, name: str) -> Score:
    """Asks base and adapter all held-out prompts."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    plain: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    prompts, references = zip(*read_data(name, held_out=True), strict=True)
    judge, count = TASKS[name].judge, len(prompts)
    by_base = sum(map(judge, answers(plain, tokenizer, list(prompts)), references))
    given = answers(PeftModel.from_pretrained(plain, ADAPTERS / name), tokenizer, list(prompts))
    wrong = tuple(pair for pair in zip(given, references, strict=True) if not judge(*pair))
    verbatim = sum(text == reference for text, reference in zip(given, references, strict=True))
    return Score(by_base / count, 1 - len(wrong) / count, verbatim / count, wrong)


def main() -> None:
    """Trains and scores the adapters named, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(RECIPES)}; all when none is given")
    parser.add_argument("--data", action="store_true", help="write demo/data first")
    parser.add_argument("--score-only", action="store_true", help="only score what is there")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(RECIPES):
        parser.error(f"no recipe for {', '.join(sorted(unknown))}")
    if arguments.data:
        write_data()
    base, scores = prepare_base(default_base_dir(), print), dict[str, Score]()
    for name in arguments.names or RECIPES:
        if not arguments.score_only:
            train(base, name)
        scores[name] = score(base, name)
        for got, reference in scores[name].wrong[:3]:
            print(f"{name}: wrong: {got!r} instead of {reference!r}", flush=True)
    print("\n| adapter | base | adapter | word for word |\n|---|---|---|---|")
    for name, row in scores.items():
        print(f"| {name} | {row.base:.0%} | {row.adapter:.0%} | {row.verbatim:.0%} |")


if __name__ == "__main__":
    main()
