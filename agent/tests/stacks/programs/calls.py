"""Makes every kind of fd, and threads. Each round waits for a byte on stdin, and the end of that is its end."""

import os
import select
import socket
import threading

listener = socket.create_server(("127.0.0.1", 0))
# The first of each imports what it needs.
threading.Thread(target=int).start()
socket.create_connection(listener.getsockname()).close()
listener.accept()[0].close()


def call_thread():
    thread = threading.Thread(target=int)
    thread.start()
    thread.join()


while os.read(0, 1):
    open("/etc/hostname").close()
    socket.socket().close()
    client = socket.socket()
    client.connect(listener.getsockname())
    listener.accept()[0].close()
    client.close()
    for fd in os.pipe():
        os.close(fd)
    os.close(os.dup(0))
    os.close(os.eventfd(0))
    select.epoll().close()
    call_thread()
