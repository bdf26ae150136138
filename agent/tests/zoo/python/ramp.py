"""A server whose connections rise from 10 to 80 within two minutes. Each lives 3 to 8 s."""

import asyncio
import random
import socket
import time

from common import end_after_argument, fork_peer

FEW, MANY = 10, 80
RAMP = 120
SHORTEST, LONGEST = 3, 8
MEAN = (SHORTEST + LONGEST) / 2


async def handle(reader, writer):
    while data := await reader.read(64):
        writer.write(data)
        await writer.drain()
    writer.close()


async def serve(listener):
    server = await asyncio.start_server(handle, sock=listener)
    await server.serve_forever()


async def visit(address):
    _, writer = await asyncio.open_connection(*address)
    writer.write(b"hello")
    await asyncio.sleep(random.uniform(SHORTEST, LONGEST))
    writer.close()


async def visit_more_and_more(address):
    began = time.monotonic()
    visits = set()
    while True:
        elapsed = time.monotonic() - began
        wanted = FEW + (MANY - FEW) * min(elapsed / RAMP, 1)
        await asyncio.sleep(random.expovariate(wanted / MEAN))
        visit_now = asyncio.create_task(visit(address))
        visits.add(visit_now)
        visit_now.add_done_callback(visits.discard)


end_after_argument()
random.seed(1)
listener = socket.create_server(("127.0.0.1", 0))
fork_peer(lambda: asyncio.run(visit_more_and_more(listener.getsockname())))
asyncio.run(serve(listener))
