"""A WebSocket server behind a sidecar: says back what it hears, and does what a path asks for."""

import asyncio
import http
import sys

from websockets.asyncio.server import serve
from websockets.exceptions import ConnectionClosed

# How connections at /vanish ended, for whoever asks at /ends.
ends: asyncio.Queue = asyncio.Queue()


def before(connection, request):
    if request.path == "/refused":
        return connection.respond(http.HTTPStatus.FORBIDDEN, "not today\n")
    return None


def choose(connection, offered):
    return next((name for name in ["chat.v2", "chat.v1"] if name in offered), None)


async def talk(connection):
    path = connection.request.path
    if path == "/server_closes":
        await connection.recv()
        await connection.close(4321, "enough of this")
    elif path == "/vanish":
        try:
            await connection.recv()
            await connection.recv()
        except ConnectionClosed as closed:
            await ends.put("without a word" if closed.rcvd is None else f"code {closed.rcvd.code}")
    elif path == "/ends":
        await connection.send(await ends.get())
    elif path == "/client_closes":
        try:
            async for _ in connection:
                pass
        finally:
            await ends.put(f"code {connection.close_code} {connection.close_reason}")
    elif path == "/ping":
        # The server asks, the client's library answers.
        await (await connection.ping(b"from the server"))
        await connection.send("the client has answered")
        await connection.wait_closed()
    else:
        async for message in connection:
            if message == "tell me your headers":
                await connection.send("\n".join(f"{name}: {value}" for name, value in connection.request.headers.raw_items()))
            else:
                await connection.send(message)


async def main():
    async with serve(
        talk, "127.0.0.1", int(sys.argv[1]), process_request=before, select_subprotocol=choose, max_size=4 << 20
    ):
        print("ready", flush=True)
        await asyncio.get_running_loop().create_future()


asyncio.run(main())
