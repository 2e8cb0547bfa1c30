"""A WebSocket client that goes through a sidecar, a case a run: prints `ok CASE`, or fails with what it saw."""

import argparse
import asyncio
import os

from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

arguments = argparse.ArgumentParser()
arguments.add_argument("--proxy", help="an HTTP proxy, which the library uses by CONNECT")
arguments.add_argument("--address", help="HOST:PORT to connect to instead of the service's own")
arguments.add_argument("case")
options = arguments.parse_args()


def open_at(path, **more):
    if options.proxy:
        more["proxy"] = options.proxy
    else:
        host, port = options.address.rsplit(":", 1)
        more |= {"proxy": None, "host": host, "port": int(port)}
    return connect(f"ws://app/{path}", max_size=4 << 20, open_timeout=20, **more)


def expect(what, found, wanted):
    if found != wanted:
        raise SystemExit(f"{what}: {found!r} instead of {wanted!r}")


async def echo():
    async with open_at("echo", compression=None) as connection:
        for message in ["", "text", "Grüße, 世界 🦀", b"", b"\x00\xff" * 500, "x" * 65_535, "x" * 65_536]:
            await connection.send(message)
            expect("the echo", await connection.recv(), message)
        await connection.send("tell me your headers")
        seen = dict(line.split(": ", 1) for line in (await connection.recv()).lower().splitlines())
        expect("Upgrade", seen["upgrade"], "websocket")
        expect("Host", seen["host"], "app")


async def ping():
    async with open_at("ping") as connection:
        await (await connection.ping(b"from the client"))
        expect("the server", await connection.recv(), "the client has answered")


async def large():
    async with open_at("echo", compression=None) as connection:
        for _ in range(3):
            message = os.urandom(1 << 20)
            await connection.send(message)
            expect("the echo", await connection.recv() == message, True)


async def fragments():
    async with open_at("echo", compression=None) as connection:

        async def pieces():
            for piece in ["in ", "four ", "", "frames"]:
                yield piece
                # A control frame may come between fragments.
                await connection.pong()

        await connection.send(pieces())
        expect("the echo", await connection.recv(), "in four frames")


async def compressed():
    async with open_at("echo") as connection:
        expect("the extension", [extension.name for extension in connection.protocol.extensions], ["permessage-deflate"])
        for message in ["a" * 300_000, os.urandom(300_000)]:
            await connection.send(message)
            expect("the echo", await connection.recv() == message, True)


async def subprotocol():
    async with open_at("echo", subprotocols=["chat.v1", "chat.v0"]) as connection:
        expect("the subprotocol", connection.subprotocol, "chat.v1")


async def client_closes():
    async with open_at("client_closes") as connection:
        await connection.send("hello")
        await connection.close(4000, "good bye")
        expect("the code", connection.close_code, 4000)
    async with open_at("ends") as connection:
        expect("the server saw", await connection.recv(), "code 4000 good bye")


async def server_closes():
    async with open_at("server_closes") as connection:
        await connection.send("hello")
        try:
            await connection.recv()
            raise SystemExit("a message instead of the end")
        except ConnectionClosed as closed:
            expect("the end", (closed.rcvd.code, closed.rcvd.reason), (4321, "enough of this"))


async def vanish():
    connection = await open_at("vanish")
    await connection.send("hello")
    connection.transport.abort()
    async with open_at("ends") as other, asyncio.timeout(5):
        expect("the server saw", await other.recv(), "without a word")


async def refused():
    try:
        async with open_at("refused"):
            raise SystemExit("a connection that should have been refused")
    except InvalidStatus as invalid:
        expect("the answer", (invalid.response.status_code, invalid.response.body), (403, b"not today\n"))


async def many():
    async def one(number):
        async with open_at("echo") as connection:
            for turn in range(10):
                await connection.send(f"{number} {turn}")
                expect("the echo", await connection.recv(), f"{number} {turn}")

    await asyncio.gather(*(one(number) for number in range(100)))


cases = {case.__name__: case for case in [
    echo, ping, large, fragments, compressed, subprotocol, client_closes, server_closes, vanish, refused, many,
]}  # fmt: skip
try:
    asyncio.run(cases[options.case]())
except InvalidStatus as invalid:
    raise SystemExit(f"refused with {invalid.response.status_code}: {invalid.response.body!r}") from invalid
print("ok", options.case)
