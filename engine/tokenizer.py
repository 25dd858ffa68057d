"""Text to tokens and back, by the base's own tokenizer."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import AutoTokenizer

from servicekit.errors import InvalidField, StartupError

_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn of a conversation."""

    role: str
    content: str


class Tokenizer:
    """The base's tokenizer.

    `encode_text`, `encode_chat` and `names` are for one thread, `decode` is for one other: the tokenizers underneath
    refuse to be shared, so each side has its own copy.

    Attributes:
        eos_ids: token ids that end an answer.
        special_ids: token ids that are left out of text.
        byte_ids: tokens that are one byte and whose text depends on the byte tokens after them (byte fallback of
            SentencePiece-like tokenizers: a run of bytes is decoded as a whole).
    """

    def __init__(self, tokenizer: Any, eos_ids: frozenset[int]) -> None:
        self._encoder = tokenizer
        self._decoder = copy.deepcopy(tokenizer)
        self.eos_ids = eos_ids
        self.special_ids = frozenset(tokenizer.all_special_ids)
        self.byte_ids = frozenset(
            number for token, number in tokenizer.get_vocab().items() if _BYTE_TOKEN.fullmatch(token)
        )

    @property
    def has_chat_template(self) -> bool:
        return bool(self._encoder.chat_template)

    def encode_text(self, text: str) -> list[int]:
        """Token ids of a text, with the special tokens the tokenizer adds by default."""
        ids: list[int] = self._encoder(text)["input_ids"]
        return ids

    def encode_chat(self, messages: Sequence[ChatMessage], template: str) -> list[int]:
        """Token ids of a conversation up to the place where the answer begins.

        Args:
            messages: oldest first.
            template: an adapter's own chat template; empty for the base's.

        Raises:
            InvalidField: there is no template, or it does not take this conversation.
        """
        if not (template or self.has_chat_template):
            raise InvalidField("chat", "neither the adapter nor the base has a chat template", "NO_CHAT_TEMPLATE")
        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            rendered = self._encoder.apply_chat_template(
                turns, chat_template=template or None, add_generation_prompt=True, tokenize=False
            )
        except (TemplateError, ValueError, TypeError, KeyError, IndexError, ArithmeticError, RecursionError) as error:
            message = f"the chat template fails: {' '.join(str(error).split())[:200]}"
            raise InvalidField("chat", message, "CHAT_TEMPLATE_FAILED") from None
        # The template writes the special tokens itself.
        ids: list[int] = self._encoder(rendered, add_special_tokens=False)["input_ids"]
        return ids

    def names(self, ids: Sequence[int]) -> list[str]:
        """The vocabulary entry of each token id."""
        names: list[str] = self._encoder.convert_ids_to_tokens(list(ids))
        return names

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out, spaces as they are."""
        text: str = self._decoder.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


def load_tokenizer(folder: Path, model: Any) -> Tokenizer:
    """The tokenizer beside a model; raises StartupError when there is none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError) as error:
        raise StartupError(f"cannot load the tokenizer of {folder}: {' '.join(str(error).split())[:300]}") from None
    stated = [getattr(model.generation_config, "eos_token_id", None), tokenizer.eos_token_id]
    eos_ids = {
        number for entry in stated if entry is not None for number in (entry if isinstance(entry, list) else [entry])
    }
    return Tokenizer(tokenizer, frozenset(eos_ids))
