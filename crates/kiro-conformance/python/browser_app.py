"""A page with an EventSource and a WebSocket, and the application behind it. What the page saw is printed as `result {…}`."""

import asyncio
import sys

from aiohttp import WSMsgType, web

PAGE = """<!DOCTYPE html>
<title>live</title>
<script>
  const seen = { events: [], lost: [], messages: [], protocol: "" };
  const events = new Promise(done => {
    const source = new EventSource("/events");
    source.addEventListener("tick", async event => {
      seen.events.push(event.data);
      // Before the application learns of it, and ends the stream.
      if (event.data === "6") source.close();
      // The next one is sent when this one has been told of: whatever held one back would stop the page.
      await fetch("/ack", { method: "POST", body: event.data });
      if (event.data === "6") done();
    });
    source.onerror = () => seen.lost.push(source.readyState === EventSource.CONNECTING ? "connects again" : "closed");
  });
  const messages = new Promise(done => {
    const socket = new WebSocket(location.origin.replace("http", "ws") + "/socket", ["chat.v1"]);
    socket.binaryType = "arraybuffer";
    socket.onopen = () => { socket.send("Grüße"); socket.send(new Uint8Array(100000).fill(7)); };
    socket.onmessage = event => {
      seen.messages.push(typeof event.data === "string" ? event.data : `${event.data.byteLength} bytes`);
      if (seen.messages.length === 2) socket.close(4001, "seen enough");
    };
    socket.onclose = event => { seen.messages.push(`${event.code} ${event.reason} ${event.wasClean}`); done(); };
  });
  Promise.all([events, messages]).then(async () => {
    seen.protocol = performance.getEntriesByType("navigation")[0].nextHopProtocol;
    await fetch("/result", { method: "POST", body: JSON.stringify(seen) });
    new EventSource("/open");
  });
</script>
"""

acks = asyncio.Queue()


async def page(request):
    return web.Response(text=PAGE, content_type="text/html")


async def stream(request):
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
    await response.prepare(request)
    return response


async def events(request):
    """Three events a connection; the browser comes back and says which it saw last."""
    response = await stream(request)
    first = int(request.headers.get("Last-Event-ID", "0")) + 1
    await response.write(b"retry: 10\n\n")
    for number in range(first, first + 3):
        await response.write(f"event: tick\nid: {number}\ndata: {number}\n\n".encode())
        await acks.get()
    return response


async def still_open(request):
    response = await stream(request)
    await response.write(b"data: hello\n\n")
    print("listener came", flush=True)
    try:
        await asyncio.Event().wait()
    finally:
        print("listener went", flush=True)


async def ack(request):
    acks.put_nowait(await request.text())
    return web.Response(status=204)


async def socket(request):
    connection = web.WebSocketResponse(protocols=["chat.v1"])
    await connection.prepare(request)
    async for message in connection:
        if message.type == WSMsgType.TEXT:
            await connection.send_str(message.data)
        elif message.type == WSMsgType.BINARY:
            await connection.send_bytes(message.data)
    print("socket closed with", connection.close_code, flush=True)
    return connection


async def result(request):
    print("result", await request.text(), flush=True)
    return web.Response(status=204)


async def main():
    app = web.Application()
    app.add_routes([
        web.get("/", page), web.get("/events", events), web.get("/open", still_open), web.post("/ack", ack),
        web.get("/socket", socket), web.post("/result", result),
    ])  # fmt: skip
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", int(sys.argv[1])).start()
    print("ready", flush=True)
    await asyncio.Event().wait()


asyncio.run(main())
