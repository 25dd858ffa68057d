"""A small server of the public contract for client tests: it says what it was told, and remembers what it was asked."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf import any_pb2, duration_pb2, timestamp_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from loraplex.v1 import adapter_pb2, adapter_pb2_grpc, generation_pb2, generation_pb2_grpc

ANSWER = ("Hel", "lo ", "wörld", " 🦜")
PROMPT_LOGPROBS = [
    generation_pb2.TokenLogprob(token_id=7, logprob=-0.5, top=[generation_pb2.TopLogprob(token_id=8, logprob=-0.25)]),
    generation_pb2.TokenLogprob(token_id=9, logprob=-2.0),
]


@dataclass
class Failure:
    """A status to end a call with, after so many deltas."""

    code: grpc.StatusCode
    message: str = "no"
    reason: str = ""
    metadata: dict[str, str] = field(default_factory=dict)
    retry_delay: float | None = None
    after_deltas: int = 0

    def abort(self, context: grpc.ServicerContext) -> None:
        if not self.reason:
            context.abort(self.code, self.message)
        details: list[Any] = [
            error_details_pb2.ErrorInfo(reason=self.reason, domain="loraplex", metadata=self.metadata)
        ]
        if self.retry_delay is not None:
            delay = duration_pb2.Duration()
            delay.FromMilliseconds(round(self.retry_delay * 1000))
            details.append(error_details_pb2.RetryInfo(retry_delay=delay))
        packed = []
        for detail in details:
            packed.append(any_pb2.Any())
            packed[-1].Pack(detail)
        code = int(self.code.value[0])
        context.abort_with_status(
            rpc_status.to_status(status_pb2.Status(code=code, message=self.message, details=packed))
        )


def adapter(adapter_id: str, **changes: Any) -> adapter_pb2.Adapter:
    values: dict[str, Any] = {
        "adapter_id": adapter_id,
        "source_uri": f"file:///adapters/{adapter_id}",
        "digest": "d" * 64,
        "base_model": "tiny",
        "method": "lora",
        "rank": 8,
        "size_bytes": 3 * 1024 * 1024,
        "weight": 1.0,
        "create_time": timestamp_pb2.Timestamp(seconds=1_700_000_000),
        "state": adapter_pb2.Adapter.STATE_ACTIVE,
        "residency": [
            adapter_pb2.Residency(node_id="n", tier=adapter_pb2.TIER_HOST),
            adapter_pb2.Residency(node_id="n", engine_id="e", tier=adapter_pb2.TIER_DEVICE),
        ],
    }
    return adapter_pb2.Adapter(**{**values, **changes})


class FakeServer(generation_pb2_grpc.GenerationServiceServicer, adapter_pb2_grpc.AdapterServiceServicer):
    """Attributes:
    failures: taken one per call but GetModelInfo, first to last.
    requests, metadata: what was received.
    endless: streams repeat their answer until they are cancelled.
    cancelled: set when a call ended before it was through.
    """

    def __init__(self) -> None:
        self.failures: list[Failure] = []
        self.requests: list[Any] = []
        self.metadata: list[dict[str, str | bytes]] = []
        self.adapters = {name: adapter(name) for name in ("pirate", "shout")}
        self.bases: list[generation_pb2.ServedBase] = []
        self.has_chat_template = True
        self.endless = self.headless = False
        self.cancelled = threading.Event()
        self._grpc = grpc.server(ThreadPoolExecutor(16))
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(self, self._grpc)
        adapter_pb2_grpc.add_AdapterServiceServicer_to_server(self, self._grpc)
        self.address = f"127.0.0.1:{self._grpc.add_insecure_port('127.0.0.1:0')}"
        self._grpc.start()

    def stop(self) -> None:
        self._grpc.stop(0).wait()

    def _received(self, request: Any, context: grpc.ServicerContext) -> Failure | None:
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        failure = self.failures.pop(0) if self.failures else None
        if failure and not failure.after_deltas:
            failure.abort(context)
        return failure

    def _completion(self, request: generation_pb2.GenerateRequest) -> generation_pb2.Completion:
        return generation_pb2.Completion(
            finish_reason=generation_pb2.FINISH_REASON_EOS,
            usage=generation_pb2.Usage(prompt_tokens=5, output_tokens=5),
            receipt=generation_pb2.Receipt(
                queue=duration_pb2.Duration(nanos=2_000_000),
                time_to_first_token=duration_pb2.Duration(seconds=1, nanos=500_000_000),
                engine_id="engine-0",
                charge=15.0,
            ),
            adapter_id=request.adapter_id,
            adapter_digest="d" * 64 if request.adapter_id else "",
            request_id=request.request_id or "made-up",
        )

    def Generate(
        self, request: generation_pb2.GenerateRequest, context: grpc.ServicerContext
    ) -> generation_pb2.GenerateResponse:
        self._received(request, context)
        return generation_pb2.GenerateResponse(
            text="".join(ANSWER),
            token_ids=range(len(ANSWER)),
            prompt_logprobs=PROMPT_LOGPROBS if request.output.prompt_logprobs else [],
            completion=self._completion(request),
        )

    def StreamGenerate(
        self, request: generation_pb2.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[generation_pb2.StreamGenerateResponse]:
        failure = self._received(request, context)
        done = threading.Event()

        def on_end() -> None:
            if not done.is_set():
                self.cancelled.set()

        if not context.add_callback(on_end):
            on_end()
        if request.output.prompt_logprobs:
            for entry in PROMPT_LOGPROBS:
                yield generation_pb2.StreamGenerateResponse(delta=generation_pb2.Delta(prompt_logprobs=[entry]))
        sent = 0
        while sent < len(ANSWER) or self.endless:
            if failure and sent == failure.after_deltas:
                done.set()
                failure.abort(context)
            piece = generation_pb2.Delta(text=ANSWER[sent % len(ANSWER)], token_ids=[sent % len(ANSWER)])
            yield generation_pb2.StreamGenerateResponse(delta=piece)
            sent += 1
            if self.endless and self.cancelled.wait(0.01):
                return
        done.set()
        if not self.headless:
            yield generation_pb2.StreamGenerateResponse(completion=self._completion(request))

    def Tokenize(
        self, request: generation_pb2.TokenizeRequest, context: grpc.ServicerContext
    ) -> generation_pb2.TokenizeResponse:
        self._received(request, context)
        return generation_pb2.TokenizeResponse(token_ids=[1, 2], tokens=["a", "b"])

    def GetModelInfo(
        self, request: generation_pb2.GetModelInfoRequest, context: grpc.ServicerContext
    ) -> generation_pb2.GetModelInfoResponse:
        self.metadata.append(dict(context.invocation_metadata()))
        return generation_pb2.GetModelInfoResponse(
            base_model="tiny",
            context_length=128,
            vocab_size=100,
            has_chat_template=self.has_chat_template,
            engine_ids=["engine-0"],
            bases=self.bases,
        )

    def RegisterAdapter(
        self, request: adapter_pb2.RegisterAdapterRequest, context: grpc.ServicerContext
    ) -> adapter_pb2.RegisterAdapterResponse:
        self._received(request, context)
        made = adapter(request.adapter_id, source_uri=request.source_uri, pinned=request.pinned)
        self.adapters[request.adapter_id] = made
        return adapter_pb2.RegisterAdapterResponse(adapter=made)

    def _known(self, adapter_id: str, context: grpc.ServicerContext) -> adapter_pb2.Adapter:
        if adapter_id not in self.adapters:
            Failure(
                grpc.StatusCode.NOT_FOUND, f"adapter {adapter_id!r} is not registered", "ADAPTER_NOT_FOUND",
                {"adapter_id": adapter_id},
            ).abort(context)  # fmt: skip
        return self.adapters[adapter_id]

    def GetAdapter(
        self, request: adapter_pb2.GetAdapterRequest, context: grpc.ServicerContext
    ) -> adapter_pb2.GetAdapterResponse:
        self._received(request, context)
        return adapter_pb2.GetAdapterResponse(adapter=self._known(request.adapter_id, context))

    def ListAdapters(
        self, request: adapter_pb2.ListAdaptersRequest, context: grpc.ServicerContext
    ) -> adapter_pb2.ListAdaptersResponse:
        """One adapter a page, so that every client has to turn pages."""
        self._received(request, context)
        names = sorted(self.adapters)
        at = int(request.page_token or 0)
        more = str(at + 1) if at + 1 < len(names) else ""
        return adapter_pb2.ListAdaptersResponse(
            adapters=[self.adapters[name] for name in names[at : at + 1]], next_page_token=more
        )

    def UpdateAdapter(
        self, request: adapter_pb2.UpdateAdapterRequest, context: grpc.ServicerContext
    ) -> adapter_pb2.UpdateAdapterResponse:
        self._received(request, context)
        changed = self._known(request.adapter_id, context)
        changed.weight = request.weight if request.HasField("weight") else changed.weight
        return adapter_pb2.UpdateAdapterResponse(adapter=changed)

    def DeleteAdapter(
        self, request: adapter_pb2.DeleteAdapterRequest, context: grpc.ServicerContext
    ) -> adapter_pb2.DeleteAdapterResponse:
        self._received(request, context)
        self._known(request.adapter_id, context)
        del self.adapters[request.adapter_id]
        return adapter_pb2.DeleteAdapterResponse()

    def PreloadAdapter(
        self, request: adapter_pb2.PreloadAdapterRequest, context: grpc.ServicerContext
    ) -> adapter_pb2.PreloadAdapterResponse:
        self._received(request, context)
        return adapter_pb2.PreloadAdapterResponse(adapter=self._known(request.adapter_id, context))

    def WatchAdapters(
        self, request: adapter_pb2.WatchAdaptersRequest, context: grpc.ServicerContext
    ) -> Iterator[adapter_pb2.AdapterEvent]:
        self._received(request, context)
        # Before anything is sent: who leaves with the last event leaves this generator where it stands.
        if not context.add_callback(self.cancelled.set):
            self.cancelled.set()
        for name in sorted(self.adapters):
            yield adapter_pb2.AdapterEvent(kind=adapter_pb2.AdapterEvent.KIND_SNAPSHOT, adapter=self.adapters[name])
        yield adapter_pb2.AdapterEvent(kind=adapter_pb2.AdapterEvent.KIND_SNAPSHOT_END)
        self.cancelled.wait(30)
