"""The same bursts through `loraplex up`: gRPC, router, cache and engine, each a process of its own, and a client here."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

from bench.engine.adapters import write_peft_folder
from bench.engine.workload import OUTPUT_TOKENS, Burst, Case, prompts
from engine.lora import TargetModule
from launcher.layout import host_tier_of
from loraplex import AsyncClient

START_SECONDS = 180


class Stack:
    """A running stack with random adapters registered and on the device. Use as an asynchronous context.

    Attributes:
        client: connected to it.
        roots: folder that adapters are registered from.
    """

    def __init__(
        self,
        model: str,
        targets: tuple[TargetModule, ...],
        adapters: int,
        rank: int,
        settings: dict[str, str],
        preload: Literal["host", "device"] = "device",
    ) -> None:
        self._model, self._targets, self._adapters, self._rank = model, targets, adapters, rank
        self._settings, self._preload = settings, preload
        self._folder = tempfile.TemporaryDirectory(prefix="loraplex-bench-")
        self.roots = Path(os.path.realpath(self._folder.name)) / "adapters"
        self.vocab_size = 0

    async def __aenter__(self) -> Stack:
        port = self._start()
        self.client = AsyncClient(f"127.0.0.1:{port}", timeout=600)
        deadline = time.monotonic() + START_SECONDS
        while not self.vocab_size:
            try:
                self.vocab_size = (await self.client.model_info(timeout=1)).vocab_size
            except Exception:
                if time.monotonic() > deadline or self._process.poll() is not None:
                    sys.stderr.write(self._log.read_text(encoding="utf-8"))
                    raise
                await asyncio.sleep(0.5)
        for number in range(self._adapters):
            path = write_peft_folder(self.roots, number, self._targets, self._rank)
            await self.client.adapters.register(path.name, path)
            await self.client.adapters.preload(path.name, self._preload)
        return self

    def _start(self) -> int:
        """Starts `loraplex up`; returns its port."""
        folder = self.roots.parent
        self.roots.mkdir()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port: int = free.getsockname()[1]
        command = [sys.executable, "-m", "launcher", "--port", str(port), "--model", self._model]
        command += ["--adapter-root", str(self.roots), "--data-dir", str(folder / "data"), "--no-demo-adapters"]
        self._log = folder / "log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=os.environ | self._settings
            )
        return port

    async def __aexit__(self, *_: object) -> None:
        await self.client.close()
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(60)
        shutil.rmtree(host_tier_of(self.roots.parent / "data"), ignore_errors=True)
        self._folder.cleanup()

    async def burst(self, case: Case, seed: int, output_tokens: int = OUTPUT_TOKENS) -> Burst:
        """One burst of a case, timed at the client."""
        wanted = zip(prompts(case.concurrency, self.vocab_size, seed), case.assign(seed), strict=True)
        began = time.perf_counter()
        arrivals = await asyncio.gather(*(self.ask(*one, output_tokens) for one in wanted))
        ended = max(times[-1] for times in arrivals)
        return Burst(ended - began, [[moment - began for moment in times] for times in arrivals])

    async def ask(self, prompt: list[int], adapter: int | None, output_tokens: int) -> list[float]:
        """One request; when each of its tokens came."""
        times: list[float] = []
        name = "" if adapter is None else f"random-{adapter:04d}"
        stream = self.client.stream(token_ids=prompt, adapter=name, max_output_tokens=output_tokens, ignore_eos=True)
        async for delta in stream:
            times += [time.perf_counter()] * len(delta.token_ids)
        return times
