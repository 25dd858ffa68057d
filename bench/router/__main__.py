"""What one router process can carry, beside a bare relay in the same run: python -m bench.router [--seconds 8]

throughput  100 clients read streams of an engine that makes up tokens at several rates. Tokens a second that arrived, and
            CPU time of the process between engine and clients per token; in microseconds, its user and system time.
memory      1,000 open streams that are idle and 10,000 requests that wait: resident memory of the router.
stuck       20 of 100 clients stop reading: tokens a second of the other 80, with and without them.

Engine, router or relay, and clients are processes of their own.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from typing import Any

import grpc
import psutil
import uvloop
from grpc_health.v1 import health_pb2, health_pb2_grpc

from bench.router.parts import PLACES
from loraplex.v1 import generation_pb2, generation_pb2_grpc

CLIENTS = 100
STUCK = 20
FOR_EVER = 1 << 30
# All clients of a channel share one connection, as those of one application server do.
CHANNELS = 4


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def request(text: str = "Hello") -> generation_pb2.GenerateRequest:
    return generation_pb2.GenerateRequest(text=text, stopping=generation_pb2.StoppingParams(max_output_tokens=FOR_EVER))


class Processes:
    """Child processes, ended on leaving."""

    def __init__(self) -> None:
        self._children: list[subprocess.Popen[bytes]] = []

    def start(self, *arguments: str) -> psutil.Process:
        child = subprocess.Popen([sys.executable, "-m", *arguments])
        self._children.append(child)
        return psutil.Process(child.pid)

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        for child in self._children:
            child.send_signal(signal.SIGKILL)
            child.wait()


async def start_router(processes: Processes, rate: float, *flags: str) -> tuple[psutil.Process, str]:
    """An engine and a router before it."""
    engine, port = free_port(), free_port()
    processes.start("bench.router.parts", "engine", str(engine), str(rate))
    address = f"127.0.0.1:{port}"
    engines = ["--engines", f"127.0.0.1:{engine}", "--cache", f"127.0.0.1:{engine}"]
    process = processes.start("router", "--listen", address, *engines, *flags)
    async with grpc.aio.insecure_channel(address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        while True:
            answer = await stub.Check(health_pb2.HealthCheckRequest(), wait_for_ready=True)
            if answer.status == health_pb2.HealthCheckResponse.SERVING:
                return process, address
            await asyncio.sleep(0.05)


async def start_relay(processes: Processes, rate: float, beat: float) -> tuple[psutil.Process, str]:
    engine, port = free_port(), free_port()
    processes.start("bench.router.parts", "engine", str(engine), str(rate))
    await asyncio.sleep(1.5)
    process = processes.start("bench.router.parts", "relay", str(port), str(engine), str(beat))
    address = f"127.0.0.1:{port}"
    async with grpc.aio.insecure_channel(address) as channel:
        await asyncio.wait_for(channel.channel_ready(), 20)
    return process, address


class Clients:
    """Streams that are read, and what came on each."""

    def __init__(self, address: str) -> None:
        self._channels = [
            grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) for _ in range(CHANNELS)
        ]
        self._tasks: list[asyncio.Task[None]] = []
        self.stuck: list[Any] = []
        self.tokens: list[int] = []
        self.messages = 0
        self.gaps: list[float] = []

    def stub(self, number: int) -> Any:
        return generation_pb2_grpc.GenerationServiceStub(self._channels[number % CHANNELS])

    def start(self, count: int) -> None:
        for _ in range(count):
            number = len(self.tokens)
            self.tokens.append(0)
            self._tasks.append(asyncio.create_task(self._read(number)))

    async def stick(self, count: int) -> None:
        """Clients, each with a connection of its own, that read one message and no more."""
        for _ in range(count):
            channel = grpc.aio.insecure_channel(str(self.address), options=[("grpc.use_local_subchannel_pool", 1)])
            call = generation_pb2_grpc.GenerationServiceStub(channel).StreamGenerate(request())
            await call.read()
            self.stuck.append((channel, call))

    address = ""

    async def _read(self, number: int) -> None:
        before = 0.0
        async for message in self.stub(number).StreamGenerate(request()):
            self.tokens[number] += len(message.delta.token_ids)
            self.messages += 1
            now = time.monotonic()
            if before and number == 0:
                self.gaps.append(now - before)
            before = now

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for channel, call in self.stuck:
            call.cancel()
            await channel.close()
        for channel in self._channels:
            await channel.close()


@dataclass
class Measured:
    tokens_per_second: float
    messages_per_second: float
    cpu_per_token: float
    cpu_share: float
    least: float
    most: float


async def measure(process: psutil.Process, clients: Clients, seconds: float, among: int = CLIENTS) -> Measured:
    """Counts what the first `among` clients get for a while."""

    def cpu() -> float:
        times = process.cpu_times()
        return float(times.user + times.system)

    tokens, messages, used, began = list(clients.tokens), clients.messages, cpu(), time.monotonic()
    await asyncio.sleep(seconds)
    took = time.monotonic() - began
    got = [after - before for before, after in zip(tokens, clients.tokens, strict=True)][:among]
    spent = cpu() - used
    return Measured(
        sum(got) / took,
        (clients.messages - messages) / took,
        spent / max(1, sum(got)),
        spent / took,
        min(got) / took,
        max(got) / took,
    )


async def throughput(seconds: float) -> None:
    print(f"throughput: {CLIENTS} clients, {seconds:.0f} s each")
    print(f"{'between':<24}{'offered/s':>10}{'tokens/s':>10}{'messages/s':>11}{'CPU us/token':>14}{'CPU share':>11}")
    for rate in (5_000, 10_000, 15_000, 20_000, 30_000):
        for name, beat in (("router", None), ("relay", 0.0), ("relay, merges 20 ms", 0.02)):
            with Processes() as processes:
                if beat is None:
                    process, address = await start_router(processes, rate)
                else:
                    process, address = await start_relay(processes, rate, beat)
                clients = Clients(address)
                clients.start(CLIENTS)
                await asyncio.sleep(1.5)
                found = await measure(process, clients, seconds)
                print(
                    f"{name:<24}{rate:>10}{found.tokens_per_second:>10.0f}{found.messages_per_second:>11.0f}"
                    f"{found.cpu_per_token * 1e6:>14.1f}{found.cpu_share:>11.2f}",
                    flush=True,
                )
                await clients.close()


def queued(metrics: str) -> int:
    """Requests that wait, as the router says."""
    with urllib.request.urlopen(f"http://{metrics}/metrics", timeout=30) as page:
        lines = page.read().decode().splitlines()
    return int(float(next(line for line in lines if line.startswith("loraplex_router_queued_requests ")).split()[1]))


async def until_queued(metrics: str, count: int) -> None:
    while await asyncio.to_thread(queued, metrics) < count:  # noqa: ASYNC110 - another process knows
        await asyncio.sleep(0.5)


async def memory() -> None:
    metrics = f"127.0.0.1:{free_port()}"
    limits = ("requests", "per-tenant", "per-adapter")
    flags = ["--metrics-listen", metrics, *(word for name in limits for word in (f"--max-queued-{name}", "10000"))]
    with Processes() as processes:
        process, address = await start_router(processes, 0.0, *flags)
        mib = 1 << 20
        print(f"memory: {process.memory_info().rss / mib:.0f} MiB with nothing to do")
        clients = Clients(address)
        # As many as the engine has places; what comes then waits.
        streams = [clients.stub(number).StreamGenerate(request("idle")) for number in range(PLACES)]
        for stream in streams:
            await stream.read()
        print(f"        {process.memory_info().rss / mib:.0f} MiB with {PLACES:,} idle streams")
        waiting = [clients.stub(number).Generate(request("x" * 200)) for number in range(10_000)]
        await asyncio.wait_for(until_queued(metrics, 10_000), 120)
        refused = sum(call.done() for call in waiting)
        print(
            f"        {process.memory_info().rss / mib:.0f} MiB with 10,000 waiting requests besides ({refused} refused)"
        )
        for call in (*streams, *waiting):
            call.cancel()
        await clients.close()


async def stuck(seconds: float, rate: float) -> None:
    """Rates of 80 clients while 20 others read and while they do not, in turns, so that a busy machine hits both alike."""
    with Processes() as processes:
        process, address = await start_router(processes, rate)
        rates: dict[bool, list[float]] = {False: [], True: []}
        for turn in range(6):
            is_stuck = bool(turn % 2)
            clients = Clients(address)
            clients.address = address
            clients.start(CLIENTS - STUCK)
            if is_stuck:
                await clients.stick(STUCK)
            else:
                clients.start(STUCK)
            await asyncio.sleep(1.5)
            found = await measure(process, clients, seconds, CLIENTS - STUCK)
            rates[is_stuck].append(found.tokens_per_second)
            await clients.close()
            await asyncio.sleep(0.5)
        quiet, disturbed = (statistics.median(rates[which]) for which in (False, True))
        print(f"stuck: {CLIENTS - STUCK} clients get {quiet:.0f} tokens/s beside {STUCK} that read,")
        print(f"       {disturbed:.0f} tokens/s beside {STUCK} that do not: {100 * (disturbed / quiet - 1):+.1f} %")
        print(f"       each turn: {[round(x) for x in rates[False]]} and {[round(x) for x in rates[True]]}")


async def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.router", description="See the module.")
    parser.add_argument("--seconds", type=float, default=8.0, help="how long each measurement takes")
    parser.add_argument("--only", choices=("throughput", "memory", "stuck"), help="one part")
    options = parser.parse_args()
    print(f"{os.cpu_count()} CPUs, Python {sys.version.split()[0]}, grpcio {grpc.__version__}")
    if options.only in (None, "throughput"):
        await throughput(options.seconds)
    if options.only in (None, "memory"):
        await memory()
    if options.only in (None, "stuck"):
        await stuck(options.seconds, 5_000)


if __name__ == "__main__":
    uvloop.run(main())
