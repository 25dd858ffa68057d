"""loraplex generate: streams an answer to the terminal."""

from __future__ import annotations

import argparse
import sys
from typing import Any, cast

from loraplex._requests import GenerateOptions
from loraplex.client import Client
from loraplex.commands.output import as_json, connect, say, write
from loraplex.types import Completion

DEFAULT_OUTPUT_TOKENS = 512
# Flags that are fields of a request under the same name.
_FIELDS = ("temperature", "top_k", "top_p", "min_p", "seed", "max_output_tokens", "stop", "ignore_eos", "request_id")


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser("generate", parents=[common], help="answer a prompt", description=__doc__)
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("prompt", metavar="PROMPT", help="the prompt; - reads it from standard input")
    add("--adapter", metavar="ID", help="adapter to answer with (default: the base)")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--chat", action="store_true", help="as a message of the user (default when there is a template)")
    kind.add_argument("--raw", action="store_true", help="as a text to continue")
    add("--system", metavar="TEXT", help="message of the system before the prompt")
    add("--max-output-tokens", type=int, default=DEFAULT_OUTPUT_TOKENS, metavar="N", help="(default: %(default)s)")
    add("--temperature", type=float, metavar="T", help="0 is greedy (default: greedy)")
    add("--top-k", type=int, metavar="K")
    add("--top-p", type=float, metavar="P")
    add("--min-p", type=float, metavar="P")
    add("--seed", type=int, metavar="N")
    add("--stop", action="append", metavar="TEXT", help="text that ends the answer; may be repeated")
    add("--ignore-eos", action="store_true", default=None, help="go on after the model's end of sequence")
    add("--request-id", metavar="ID")
    add("--json", action="store_true", help="print the whole answer as one line of JSON")
    add("--stats", action="store_true", help="say afterwards what the answer cost")


def run(options: argparse.Namespace) -> int:
    with connect(options) as client:
        text, request = _request(client, options)
        if options.json:
            write(as_json(client.generate(text, **request)))
            return 0
        with client.stream(text, **request) as stream:
            for delta in stream:
                write(delta.text)
        write("\n")
        if options.stats:
            say(_stats(stream.completion))
    return 0


def _request(client: Client, options: argparse.Namespace) -> tuple[str | None, GenerateOptions]:
    """Arguments of `Client.generate`: the text of a raw prompt, and the options."""
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    request: dict[str, Any] = {name: getattr(options, name) for name in _FIELDS if getattr(options, name) is not None}
    if options.adapter:
        request["adapter"] = options.adapter
    if options.raw and options.system:
        raise ValueError("--system is a message of a chat; it cannot go with --raw")
    if options.timeout is not None:
        request["timeout"] = options.timeout
    if options.raw or not (options.chat or options.system or _chats(client, options.adapter)):
        return prompt, cast(GenerateOptions, request)
    system = [("system", options.system)] if options.system else []
    request["messages"] = [*system, ("user", prompt)]
    return None, cast(GenerateOptions, request)


def _chats(client: Client, adapter_id: str | None) -> bool:
    """Whether base or adapter has a chat template."""
    return client.model_info().has_chat_template or bool(adapter_id and client.adapters.get(adapter_id).chat_template)


def _stats(completion: Completion) -> str:
    usage, receipt = completion.usage, completion.receipt
    reason = completion.finish_reason.name if completion.finish_reason else "unknown"
    tier = f", adapter on {receipt.adapter_tier} at arrival" if receipt.adapter_tier else ""
    decode = receipt.total - receipt.time_to_first_token
    rate = f", {(usage.output_tokens - 1) / decode:.1f} tokens/s" if usage.output_tokens > 1 and decode > 0 else ""
    return (
        f"{usage.prompt_tokens} + {usage.output_tokens} tokens, ended by {reason}, first token after "
        f"{receipt.time_to_first_token * 1000:.0f} ms{rate}{tier}, charge {receipt.charge:g}, {receipt.engine_id}"
    )
