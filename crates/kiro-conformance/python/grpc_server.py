"""A gRPC server behind a sidecar: grpc.testing.TestService, health and reflection. It does what its Go twin does."""

import asyncio
import os
import pathlib
import sys

import grpc
from google.protobuf import any_pb2
from google.rpc import status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from grpc_status import rpc_status

sys.path.insert(0, str(pathlib.Path(__file__).parent))
pb, services = grpc.protos_and_services("test_service.proto")

INITIAL = "x-grpc-test-echo-initial"
TRAILING = "x-grpc-test-echo-trailing-bin"
CODES = {code.value[0]: code for code in grpc.StatusCode}


class TestService(services.TestServiceServicer):
    def __init__(self):
        # Calls that were cancelled, for whoever asks.
        self.cancelled = asyncio.Queue()

    async def EmptyCall(self, request, context):
        return pb.Empty()

    async def UnaryCall(self, request, context):
        given = dict(context.invocation_metadata())
        trailing = await echo_metadata(context)
        left = context.time_remaining()
        if left is not None and left < 1e6:
            trailing.append(("x-deadline-ms", str(int(left * 1000))))
        context.set_trailing_metadata(tuple(trailing))
        match given.get("x-ask"):
            case "cancelled":
                await self.cancelled.get()
                return pb.SimpleResponse(username="cancelled")
            case "caller":
                return pb.SimpleResponse(username=given.get("x-kiro-caller", ""))
            case "sleep":
                await asyncio.Event().wait()
        asked = request.response_status
        if asked.code and "x-with-details" in given:
            detail = any_pb2.Any()
            detail.Pack(pb.EchoStatus(code=42, message="in detail"))
            status = status_pb2.Status(code=asked.code, message=asked.message, details=[detail])
            await context.abort_with_status(rpc_status.to_status(status))
        if asked.code:
            await context.abort(CODES[asked.code], asked.message)
        body = bytes(request.response_size) if request.response_size else request.payload.body
        return pb.SimpleResponse(payload=pb.Payload(body=body))

    async def StreamingInputCall(self, requests, context):
        total = 0
        async for request in requests:
            total += len(request.payload.body)
        return pb.StreamingInputCallResponse(aggregated_payload_size=total)

    async def StreamingOutputCall(self, request, context):
        async for answer in outputs(request):
            yield answer

    async def FullDuplexCall(self, requests, context):
        context.set_trailing_metadata(tuple(await echo_metadata(context)))
        async for request in requests:
            async for answer in outputs(request):
                yield answer
            if dict(context.invocation_metadata()).get("x-ask") == "die":
                os._exit(1)
            if request.response_status.code:
                await context.abort(CODES[request.response_status.code], request.response_status.message)

    async def HalfDuplexCall(self, requests, context):
        """Answers once and then waits for the call's end."""
        # An exception in here would be missed where the end comes while the answer is being sent.
        context.add_done_callback(lambda _: self.cancelled.put_nowait(None))
        yield pb.StreamingOutputCallResponse()
        await asyncio.Event().wait()


async def outputs(request):
    for asked in request.response_parameters:
        if asked.interval_us:
            await asyncio.sleep(asked.interval_us / 1e6)
        yield pb.StreamingOutputCallResponse(payload=pb.Payload(body=bytes(asked.size)))


async def echo_metadata(context):
    given = context.invocation_metadata()
    initial = [(name, value) for name, value in given if name == INITIAL]
    if initial:
        await context.send_initial_metadata(tuple(initial))
    return [(name, value) for name, value in given if name == TRAILING]


async def main():
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", 32 << 20),
            ("grpc.max_send_message_length", 32 << 20),
            ("grpc.so_reuseport", 0),
        ]
    )
    services.add_TestServiceServicer_to_server(TestService(), server)
    checks = health.aio.HealthServicer()
    await checks.set("", health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    reflection.enable_server_reflection(("grpc.testing.TestService", reflection.SERVICE_NAME), server)
    server.add_insecure_port(f"127.0.0.1:{sys.argv[1]}")
    await server.start()
    print("ready", flush=True)
    await server.wait_for_termination()


asyncio.run(main())
