"""A gRPC client that goes through a sidecar, a case a run: prints `ok CASE`, or fails with what it saw. Blocking, as most are."""

import argparse
import os
import pathlib
import queue
import sys
import threading
import time

import grpc
from google.rpc import status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

sys.path.insert(0, str(pathlib.Path(__file__).parent))
pb, services = grpc.protos_and_services("test_service.proto")

INITIAL = "x-grpc-test-echo-initial"
TRAILING = "x-grpc-test-echo-trailing-bin"
CODES = {code.value[0]: code for code in grpc.StatusCode}
PATIENCE = 30


def expect(what, found, wanted):
    if found != wanted:
        raise SystemExit(f"{what}: {found!r} instead of {wanted!r}")


def failure(call):
    """The error that a call ends with."""
    try:
        call()
    except grpc.RpcError as error:
        return error
    raise SystemExit("an answer instead of an error")


def output(*sizes, interval_us=0, code=0, message=""):
    asked = pb.StreamingOutputCallRequest(response_status=pb.EchoStatus(code=code, message=message))
    for size in sizes:
        asked.response_parameters.add(size=size, interval_us=interval_us)
    return asked


def unary(stub, channel):
    stub.EmptyCall(pb.Empty(), timeout=PATIENCE)
    for size in [0, 1, 1000, 271828]:
        body = os.urandom(size)
        answer = stub.UnaryCall(pb.SimpleRequest(payload=pb.Payload(body=body)), timeout=PATIENCE)
        expect("the echo", answer.payload.body == body, True)


def client_streaming(stub, channel):
    sizes = [27182, 8, 1828, 0, 45904]
    messages = (pb.StreamingInputCallRequest(payload=pb.Payload(body=os.urandom(size))) for size in sizes)
    answer = stub.StreamingInputCall(messages, timeout=PATIENCE)
    expect("the sum", answer.aggregated_payload_size, sum(sizes))


def server_streaming(stub, channel):
    sizes = [31415, 9, 2653, 58979]
    answers = stub.StreamingOutputCall(output(*sizes), timeout=PATIENCE)
    expect("the sizes", [len(answer.payload.body) for answer in answers], sizes)


def bidi_streaming(stub, channel):
    requests = queue.SimpleQueue()
    answers = stub.FullDuplexCall(iter(requests.get, None), timeout=PATIENCE)
    # Each message waits for the answer to the one before: nothing may hold one back.
    for size in [31415, 9, 2653, 58979, 0]:
        requests.put(output(size))
        expect("the size", len(next(answers).payload.body), size)
    requests.put(None)
    expect("the rest", list(answers), [])


def metadata(stub, channel):
    binary = b"\x00\x01\xab\xff\n\x80,"
    given = ((INITIAL, "one"), (INITIAL, "two"), (TRAILING, binary))

    def check(initial, trailing):
        expect("initial metadata", [value for name, value in initial if name == INITIAL], ["one", "two"])
        expect("trailing metadata", [value for name, value in trailing if name == TRAILING], [binary])

    _, call = stub.UnaryCall.with_call(pb.SimpleRequest(), metadata=given, timeout=PATIENCE)
    check(call.initial_metadata(), call.trailing_metadata())
    call = stub.FullDuplexCall(iter([]), metadata=given, timeout=PATIENCE)
    expect("the messages", list(call), [])
    check(call.initial_metadata(), call.trailing_metadata())


def errors(stub, channel):
    # All that gRPC has, by trailers alone.
    for code in range(1, 17):
        asked = pb.SimpleRequest(response_status=pb.EchoStatus(code=code, message="as you wish"))
        error = failure(lambda: stub.UnaryCall(asked, timeout=PATIENCE))
        expect("the status", (error.code(), error.details()), (CODES[code], "as you wish"))
    special = "\t\ntest with whitespace\r\nand Unicode BMP ☺ and non-BMP 😈, 100 %\t\n"
    asked = pb.SimpleRequest(response_status=pb.EchoStatus(code=9, message=special))
    error = failure(lambda: stub.UnaryCall(asked, metadata=(("x-with-details", "yes"),), timeout=PATIENCE))
    expect("the message", error.details(), special)
    status = rpc_status.from_call(error)
    detail = pb.EchoStatus()
    expect("the details", len(status.details), 1)
    expect("the detail's kind", status.details[0].Unpack(detail), True)
    expect("the detail", detail.message, "in detail")


def error_after_messages(stub, channel):
    answers = stub.FullDuplexCall(iter([output(10, 20, code=10, message="half way")]), timeout=PATIENCE)
    expect("the sizes", [len(next(answers).payload.body) for _ in range(2)], [10, 20])
    error = failure(lambda: next(answers))
    expect("the status", (error.code(), error.details()), (grpc.StatusCode.ABORTED, "half way"))


def deadline(stub, channel):
    _, call = stub.UnaryCall.with_call(pb.SimpleRequest(), timeout=7)
    left = dict(call.trailing_metadata()).get("x-deadline-ms")
    expect("the server knows a deadline", left is not None, True)
    expect(f"{left} ms are left of 7000", 3000 < int(left) <= 7000, True)


def deadline_exceeded(stub, channel):
    begin = time.monotonic()
    error = failure(lambda: stub.UnaryCall(pb.SimpleRequest(), metadata=(("x-ask", "sleep"),), timeout=0.3))
    expect("the code", error.code(), grpc.StatusCode.DEADLINE_EXCEEDED)
    expect("it took no longer", time.monotonic() - begin < 5, True)


def cancel(stub, channel):
    release = threading.Event()

    def silence():
        release.wait()
        yield from ()

    call = stub.HalfDuplexCall(silence(), timeout=PATIENCE)
    next(call)
    call.cancel()
    expect("the code", call.code(), grpc.StatusCode.CANCELLED)
    release.set()
    answer = stub.UnaryCall(pb.SimpleRequest(), metadata=(("x-ask", "cancelled"),), timeout=5)
    expect("the server saw", answer.username, "cancelled")


def large(stub, channel):
    body = os.urandom(8 << 20)
    answer = stub.UnaryCall(pb.SimpleRequest(payload=pb.Payload(body=body)), timeout=PATIENCE)
    expect("the echo", answer.payload.body == body, True)


def gzip(stub, channel):
    body = b"again and " * 30_000
    asked = pb.SimpleRequest(payload=pb.Payload(body=body))
    answer = stub.UnaryCall(asked, compression=grpc.Compression.Gzip, timeout=PATIENCE)
    expect("the echo", answer.payload.body == body, True)


def keepalive(stub, channel):
    # Several pings long. A proxy that counts pings as abuse, or does not answer them, ends the connection.
    answers = stub.StreamingOutputCall(output(1, 1, interval_us=2_000_000), timeout=PATIENCE)
    expect("the answers", len(list(answers)), 2)


def parallel(stub, channel):
    def one(number, failures):
        try:
            requests = queue.SimpleQueue()
            answers = stub.FullDuplexCall(iter(requests.get, None), timeout=PATIENCE)
            for turn in range(5):
                requests.put(output(number + turn))
                found = len(next(answers).payload.body)
                if found != number + turn:
                    failures.append(f"{found} instead of {number + turn}")
            requests.put(None)
            list(answers)
        except grpc.RpcError as error:
            failures.append(str(error))

    failures = []
    threads = [threading.Thread(target=one, args=(number, failures)) for number in range(100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expect("what failed", failures, [])


def denied(stub, channel):
    error = failure(lambda: stub.UnaryCall(pb.SimpleRequest(), timeout=PATIENCE))
    expect("the code of a call", error.code(), grpc.StatusCode.PERMISSION_DENIED)
    error = failure(lambda: list(stub.FullDuplexCall(iter([output(1)]), timeout=PATIENCE)))
    expect("the code of a stream", error.code(), grpc.StatusCode.PERMISSION_DENIED)
    stub.EmptyCall(pb.Empty(), timeout=PATIENCE)


def unavailable(stub, channel):
    error = failure(lambda: stub.EmptyCall(pb.Empty(), timeout=PATIENCE))
    expect("the code", error.code(), grpc.StatusCode.UNAVAILABLE)


def dies(stub, channel):
    def request():
        yield output(1)
        threading.Event().wait()

    error = failure(lambda: list(stub.FullDuplexCall(request(), metadata=(("x-ask", "die"),), timeout=PATIENCE)))
    expect(f"the code of {error.details()!r}", error.code(), grpc.StatusCode.UNAVAILABLE)
    # The generator above waits for ever.
    print("ok dies")
    sys.stdout.flush()
    os._exit(0)


def unimplemented(stub, channel):
    for call in [stub.UnimplementedCall, services.UnimplementedServiceStub(channel).UnimplementedCall]:
        error = failure(lambda call=call: call(pb.Empty(), timeout=PATIENCE))
        expect("the code", error.code(), grpc.StatusCode.UNIMPLEMENTED)


def health(stub, channel):
    client = health_pb2_grpc.HealthStub(channel)
    serving = health_pb2.HealthCheckResponse.SERVING
    expect("the health", client.Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE).status, serving)
    watch = client.Watch(health_pb2.HealthCheckRequest(), timeout=PATIENCE)
    expect("the health", next(watch).status, serving)
    watch.cancel()


def reflection(stub, channel):
    client = reflection_pb2_grpc.ServerReflectionStub(channel)
    asked = reflection_pb2.ServerReflectionRequest(list_services="")
    answer = next(client.ServerReflectionInfo(iter([asked]), timeout=PATIENCE))
    names = [service.name for service in answer.list_services_response.service]
    expect(f"TestService in {names}", "grpc.testing.TestService" in names, True)


def caller(stub, channel):
    answer = stub.UnaryCall(pb.SimpleRequest(), metadata=(("x-ask", "caller"),), timeout=PATIENCE)
    expect("the caller that the server was told", answer.username, "caller")


CASES = {case.__name__: case for case in [
    unary, client_streaming, server_streaming, bidi_streaming, metadata, errors, error_after_messages, deadline,
    deadline_exceeded, cancel, large, gzip, keepalive, parallel, denied, unavailable, dies, unimplemented, health, reflection, caller,
]}  # fmt: skip


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--target", help="HOST:PORT to connect to, or a service's name behind the proxy of the environment")
    arguments.add_argument("--authority", help="the service's name, where the target is not")
    arguments.add_argument("case", choices=CASES)
    asked = arguments.parse_args()
    options = [
        ("grpc.max_receive_message_length", 32 << 20),
        ("grpc.max_send_message_length", 32 << 20),
        # What fails should be seen, not be tried again.
        ("grpc.enable_retries", 0),
    ]
    if asked.authority:
        options.append(("grpc.default_authority", asked.authority))
    if asked.case == "keepalive":
        options += [("grpc.keepalive_time_ms", 1000), ("grpc.keepalive_timeout_ms", 2000), ("grpc.http2.max_pings_without_data", 0)]
    with grpc.insecure_channel(asked.target, options=options) as channel:
        CASES[asked.case](services.TestServiceStub(channel), channel)
    print("ok", asked.case)


main()
