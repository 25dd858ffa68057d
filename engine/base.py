"""The base model's files: where they are and what identifies them."""

from __future__ import annotations

import hashlib
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from servicekit.errors import StartupError

# What says how a configuration was written, not what it computes.
NOISE = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "_attn_implementation_autoset")
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def locate_base(model: str) -> Path:
    """The folder of a base named by folder or hub id; fetches it from the hub when it is not there yet.

    Raises StartupError, in one line, when there is no such model or it holds no safetensors weights.
    """
    if not model:
        raise StartupError("no base model is set (--model)")
    folder = Path(os.path.expanduser(model))
    if not folder.is_dir():
        if folder.exists():
            raise StartupError(f"{model} is a file; a model is a folder or a hub id")
        if model.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(model):
            raise StartupError(f"the model folder {model} does not exist")
        folder = _fetch(model)
    if not (folder / "config.json").is_file():
        raise StartupError(f"{model} is not a model: it has no config.json")
    if not weight_files(folder):
        raise StartupError(f"{model} has no safetensors weights; other formats are not read")
    return folder


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model, by name."""
    return sorted(folder.glob("*.safetensors"))


def base_digest(folder: Path) -> str:
    """sha256, in hex, over the normalised configuration and the bytes of every weight file."""
    with ThreadPoolExecutor(max_workers=4) as threads:
        digests = threads.map(_file_digest, weight_files(folder))
    config = _normalised(json.loads((folder / "config.json").read_text()))
    return hashlib.sha256("\n".join([config, *digests]).encode()).hexdigest()


def _normalised(config: dict[str, Any]) -> str:
    kept = {key: value for key, value in config.items() if key not in NOISE}
    return json.dumps(kept, sort_keys=True, separators=(",", ":"))


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fetch(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=HUB_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise StartupError(f"cannot fetch the model {model}: {reason}") from None
