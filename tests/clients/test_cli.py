"""The `loraplex` command against a server, in this process and as a real one."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from loraplex import cli
from loraplex.commands.output import table, width
from loraplex.v1 import adapter_pb2, generation_pb2
from tests.clients.fake import ANSWER, Failure, FakeServer

TEXT = "".join(ANSWER)


@pytest.fixture
def run(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*arguments: str) -> tuple[int, str, str]:
        try:
            code = cli.main([*arguments, "--address", server.address])
        except SystemExit as exited:
            code = int(exited.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return run


Run = Callable[..., tuple[int, str, str]]


def process(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "loraplex.cli", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options,
    )  # fmt: skip


def test_generate_streams_the_answer(run: Run, server: FakeServer) -> None:
    assert run("generate", "hi", "--adapter", "pirate", "--stop", "x", "--temperature", "0.5", "--stats") == (
        0,
        TEXT + "\n",
        "5 + 5 tokens, ended by EOS, first token after 1500 ms, charge 15, engine-0\n",
    )
    request = server.requests[-1]
    assert (request.chat.messages[0].role, request.chat.messages[0].content) == ("user", "hi")
    assert (request.adapter_id, list(request.stopping.stop), request.sampling.temperature) == ("pirate", ["x"], 0.5)
    assert request.stopping.max_output_tokens == 512


def test_a_base_without_a_template_is_sent_the_text(run: Run, server: FakeServer) -> None:
    server.has_chat_template = False
    assert run("generate", "hi")[0] == 0
    assert server.requests[-1].text == "hi"
    server.adapters["pirate"].chat_template = "{{ messages }}"
    run("generate", "hi", "--adapter", "pirate")
    assert server.requests[-1].WhichOneof("prompt") == "chat"


def test_the_kind_of_prompt_can_be_said(run: Run, server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    run("generate", "--raw", "hi")
    assert server.requests[-1].text == "hi"
    run("generate", "--chat", "--system", "be kind", "hi")
    assert [turn.role for turn in server.requests[-1].chat.messages] == ["system", "user"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("from a pipe"))
    run("generate", "--raw", "-")
    assert server.requests[-1].text == "from a pipe"


def test_generate_as_json(run: Run) -> None:
    code, out, _ = run("generate", "hi", "--json")
    answer = json.loads(out)
    assert code == 0 and answer["text"] == TEXT and answer["finish_reason"] == "EOS"
    assert answer["receipt"]["time_to_first_token"] == 1.5


def test_adapters_are_shown_as_a_table_or_as_json(run: Run) -> None:
    code, out, _ = run("adapters", "list")
    lines = out.splitlines()
    assert code == 0 and lines[0].split()[:3] == ["ADAPTER", "STATE", "TIER"]
    assert lines[2].split()[:3] == ["pirate", "active", "device"]
    assert [json.loads(line)["adapter_id"] for line in run("adapters", "list", "--json")[1].splitlines()] == [
        "pirate",
        "shout",
    ]


def test_the_table_of_adapters_tells_where_who_and_when(run: Run, server: FakeServer) -> None:
    pirate = server.adapters["pirate"]
    before = adapter_pb2.Adapter()
    before.CopyFrom(pirate)
    pirate.residency.add(node_id="n2", tier=adapter_pb2.TIER_DISK)
    pirate.leases.add(node_id="n1", engine_id="e1")
    pirate.last_use_time.FromSeconds(int(time.time()) - 125)
    pirate.failure.reason = "SOURCE_CHANGED"
    lines = run("adapters", "list")[1].splitlines()
    assert "LAST USE" in lines[0] and "LEASES" in lines[0]
    assert "n2 disk" in lines[2] and "2 min ago" in lines[2] and "SOURCE_CHANGED" in lines[2] and "never" in lines[3]
    pirate.CopyFrom(before)


def test_the_base_of_an_adapter_is_shown_and_can_be_said(run: Run, server: FakeServer) -> None:
    server.adapters["pirate"].base_name = "org/small"
    server.adapters["shout"].base_digest = "e" * 64
    lines = run("adapters", "list")[1].splitlines()
    assert "BASE" in lines[0] and "org/small" in lines[2] and "e" * 12 in lines[3] and "e" * 13 not in lines[3]
    assert json.loads(run("adapters", "get", "pirate", "--json")[1])["base_name"] == "org/small"
    assert run("adapters", "register", "new", "hf://a/b", "--base", "org/small")[0] == 0
    assert server.requests[-1].base_model == "org/small"
    assert run("adapters", "register", "new", "hf://a/b")[0] == 0
    assert not server.requests[-1].HasField("base_model")


def test_info_names_every_base(run: Run, server: FakeServer) -> None:
    assert "also serves" not in run("info")[1]
    for name, digest in (("tiny", "d" * 64), ("large", "e" * 64)):
        server.bases.append(
            generation_pb2.ServedBase(base_model=name, base_digest=digest, engine_ids=[f"engine-{name}"])
        )
    lines = run("info")[1].splitlines()
    assert [line for line in lines if "also serves" in line] == [
        f"also serves       large, digest {'e' * 12}, on engine-large"
    ]
    assert [base["base_model"] for base in json.loads(run("info", "--json")[1])["bases"]] == ["tiny", "large"]


def test_credentials_come_from_a_file_and_not_from_an_argument(run: Run, server: FakeServer, tmp_path: Any) -> None:
    file = tmp_path / "rights.json"
    file.write_text('{"token": "t0ken"}')
    assert run("adapters", "register", "new", "hf://a/b", "--credentials", str(file))[0] == 0
    assert server.requests[-1].credentials.token == "t0ken"
    file.write_text('{"tokn": "t0ken"}')
    code, _, errors = run("adapters", "register", "new", "hf://a/b", "--credentials", str(file))
    assert code == 2 and "not a JSON object" in errors and "t0ken" not in errors


def test_every_adapter_action(run: Run, server: FakeServer, tmp_path: Any) -> None:
    assert run("adapters", "register", "new", str(tmp_path), "--pinned", "--weight", "2")[0] == 0
    assert server.requests[-1].source_uri == f"file://{tmp_path}"
    assert (server.requests[-1].pinned, server.requests[-1].weight) == (True, 2)
    assert run("adapters", "register", "new", "hf://owner/name")[0] == 0
    assert server.requests[-1].source_uri == "hf://owner/name"
    assert "pirate" in run("adapters", "get", "pirate")[1]
    assert run("adapters", "preload", "pirate", "--tier", "host")[0] == 0
    assert server.requests[-1].tier == 3
    assert run("adapters", "delete", "new", "--force") == (0, "", "new is deleted\n")
    assert server.requests[-1].force
    code, out, _ = run("adapters", "watch", "--once")
    assert code == 0 and [line.split()[:2] for line in out.splitlines()] == [
        ["snapshot", "pirate"],
        ["snapshot", "shout"],
    ]


def test_info(run: Run) -> None:
    assert "base model" in run("info")[1]
    assert json.loads(run("info", "--json")[1])["vocab_size"] == 100


def test_bench_measures_every_adapter(run: Run, server: FakeServer) -> None:
    code, out, _ = run("bench", "--requests", "6", "--concurrency", "3", "--adapters", "all", "--json")
    rows = {row["adapter"]: row for row in map(json.loads, out.splitlines())}
    assert code == 0 and set(rows) == {"pirate", "shout", "all"}
    assert (rows["all"]["requests"], rows["all"]["output tokens"], rows["all"]["errors"]) == (6, 24, 0)
    assert rows["all"]["TTFT p95 ms"] >= rows["all"]["TTFT p50 ms"] > 0
    prompts = [list(r.token_ids.ids) for r in server.requests if hasattr(r, "token_ids")]
    assert len(prompts) == 6 and all(len(prompt) == 64 for prompt in prompts)
    assert run("bench", "--requests", "2")[1].splitlines()[2].split()[0] == "(base)"


def test_bench_counts_errors(run: Run, server: FakeServer) -> None:
    failed = Failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", "QUEUE_FULL")
    server.failures = [Failure(grpc.StatusCode.UNAVAILABLE), failed]
    code, out, err = run("bench", "--requests", "3", "--concurrency", "1", "--json")
    assert code == 1 and json.loads(out)["errors"] == 1
    assert err == "1 requests failed: RESOURCE_EXHAUSTED QUEUE_FULL\n"


@pytest.mark.parametrize(
    "arguments, code, text",
    [
        (["adapters", "get", "nobody"], 1,
         "loraplex: NOT_FOUND: adapter 'nobody' is not registered (reason ADAPTER_NOT_FOUND)\n"),
        (["generate", "x", "--max-output-tokens", "99999999999"], 2, "max_output_tokens"),
        (["generate", "x", "--raw", "--system", "y"], 2, "--system"),
        (["generate"], 2, "PROMPT"),
        (["generate", "x", "--temperature", "hot"], 2, "--temperature"),
        (["bench", "--requests", "0"], 2, "--requests"),
        (["bench", "--output-tokens", "99999999999"], 2, "--output-tokens"),
        (["adapters", "preload", "x", "--tier", "moon"], 2, "moon"),
        (["dance"], 2, "dance"),
        ([], 2, "COMMAND"),
    ],
)  # fmt: skip
def test_what_goes_wrong_is_one_line(run: Run, arguments: list[str], code: int, text: str) -> None:
    got, _, err = run(*arguments)
    assert got == code
    assert text in err and err.count("\n") == 1 and err.endswith("\n")


def test_an_error_names_status_reason_field_and_delay(run: Run, server: FakeServer) -> None:
    server.failures = [
        Failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue\nis full", "QUEUE_FULL", {"field": "tenant"}, 1.5)
    ]
    assert run("generate", "--raw", "x") == (
        1, "",
        "loraplex: RESOURCE_EXHAUSTED: the queue is full (reason QUEUE_FULL, field tenant, retry after 1.5 s)\n",
    )  # fmt: skip


@pytest.mark.parametrize("address", ["127.0.0.1:1", "unix:/nowhere", "no such host:1", "", "x" * 300])
def test_no_server_is_one_line(capsys: pytest.CaptureFixture[str], address: str) -> None:
    assert cli.main(["info", "--address", address, "--timeout", "2"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("loraplex: ") and err.count("\n") == 1


def test_a_tenant_that_cannot_be_sent_is_one_line(run: Run) -> None:
    code, _, err = run("info", "--tenant", "ä\n")
    assert code in (1, 2) and err.count("\n") == 1


def test_up_without_the_server_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "entry_points", lambda group: [])
    assert cli.main(["up", "--port", "1"]) == 1
    assert "pip install 'loraplex-server" in capsys.readouterr().err


def test_up_is_handed_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    class Entry:
        name = "up"

        def load(self) -> Callable[[list[str]], int]:
            return lambda argv: seen.append(argv) or 7  # type: ignore[func-returns-value]

    monkeypatch.setattr(cli, "entry_points", lambda group: [Entry()])
    assert cli.main(["up", "--port", "1", "--x"]) == 7
    assert seen == [["--port", "1", "--x"]]


def test_ctrl_c_ends_quietly_and_cancels(server: FakeServer) -> None:
    server.endless = True
    child = process("generate", "--raw", "x", "--address", server.address)
    assert child.stdout and child.stdout.read(3) == "Hel"
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=10)
    assert (child.returncode, err) == (130, "")
    assert server.cancelled.wait(5)


def test_ctrl_c_during_a_bench_ends_quietly(server: FakeServer) -> None:
    server.endless = True
    child = process("bench", "--address", server.address)
    while len(server.requests) < 4:
        assert child.poll() is None
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=10)
    assert (child.returncode, err) == (130, "")


def test_a_closed_pipe_ends_quietly(server: FakeServer) -> None:
    server.endless = True
    child = process("generate", "--raw", "x", "--address", server.address)
    assert child.stdout and child.stderr and child.stdout.read(3) == "Hel"
    child.stdout.close()
    assert child.stderr.read() == ""
    assert child.wait(10) == 141
    child.stderr.close()
    assert server.cancelled.wait(5)


def test_text_that_the_terminal_cannot_show_is_no_error(server: FakeServer) -> None:
    import os

    child = process(
        "generate", "--raw", "x", "--address", server.address,
        env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
    )  # fmt: skip
    out, err = child.communicate(timeout=10)
    assert (child.returncode, out, err) == (0, "Hello w?rld ?\n", "")


def test_tables_line_up_with_wide_characters() -> None:
    lines = table(("name", "n"), [("日本", 1), ("ab", 200)]).splitlines()
    assert [width(line) for line in lines] == [9, 9, 9, 9]
    assert lines[2] == "日本    1"
