"""Spools each message into a file that it deletes. Leaks the file, which stays open."""

import os
import time

from common import end_after_argument

spooled = []


def spool_message(message):
    file = open("message.spool", "w+b")
    file.write(message)
    file.flush()
    os.unlink(file.name)
    spooled.append(file)


def receive():
    while True:
        spool_message(b"x" * 4096)
        time.sleep(1)


end_after_argument()
receive()
