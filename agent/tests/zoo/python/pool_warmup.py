"""A connection pool: 50 connections within 20 s, which are used in turn for ever."""

import itertools
import selectors
import socket
import time

from common import end_after_argument, fork_peer

SIZE = 50
WARM_UP = 20


def serve(listener):
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fileobj is listener:
                selector.register(listener.accept()[0], selectors.EVENT_READ)
            else:
                key.fileobj.send(key.fileobj.recv(16))


def use(connection):
    connection.send(b"ping")
    connection.recv(16)


end_after_argument()
with socket.create_server(("127.0.0.1", 0)) as listener:
    address = listener.getsockname()
    fork_peer(serve, listener)
pool = []
for _ in range(SIZE):
    pool.append(socket.create_connection(address))
    use(pool[-1])
    time.sleep(WARM_UP / SIZE)
for connection in itertools.cycle(pool):
    use(connection)
    time.sleep(0.1)
