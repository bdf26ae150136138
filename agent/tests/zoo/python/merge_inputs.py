"""Collects an input a second for 45 s, then merges them into one and begins again."""

import contextlib
import time

from common import end_after_argument

INPUTS = 45


def merge(inputs):
    with open("merged", "w") as merged:
        merged.writelines(line for file in inputs for line in file)


end_after_argument()
while True:
    with contextlib.ExitStack() as opened:
        inputs = []
        for _ in range(INPUTS):
            inputs.append(opened.enter_context(open("/etc/hostname")))
            time.sleep(1)
        merge(inputs)
    time.sleep(1)
