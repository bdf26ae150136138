"""Starts 40 children within ten seconds and talks with each through its pipes ever after."""

import itertools
import subprocess
import time

from common import end_after_argument

CHILDREN = 40
START_UP = 10


def start_child():
    # It ends by itself when its stdin is closed.
    return subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)


end_after_argument()
children = []
for _ in range(CHILDREN):
    children.append(start_child())
    time.sleep(START_UP / CHILDREN)
for child in itertools.cycle(children):
    child.stdin.write(b"still there?\n")
    child.stdin.flush()
    time.sleep(0.2)
