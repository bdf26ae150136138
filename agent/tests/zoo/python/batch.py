"""Every 20 s a batch: opens 100 files, reads them for 8 s and closes them."""

import contextlib
import time

from common import end_after_argument

FILES = 100
WORK = 8
PERIOD = 20


def run_batch():
    with contextlib.ExitStack() as files:
        for _ in range(FILES):
            files.enter_context(open("/etc/hostname"))
        time.sleep(WORK)


end_after_argument()
while True:
    run_batch()
    time.sleep(PERIOD - WORK)
