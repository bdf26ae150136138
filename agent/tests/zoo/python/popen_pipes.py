"""Runs a check each second and keeps its process object. Leaks the pipe of each."""

import subprocess
import time

from common import end_after_argument

checks = []


def run_check():
    check = subprocess.Popen(["true"], stdout=subprocess.PIPE)
    check.wait()
    checks.append(check)


def monitor():
    while True:
        run_check()
        time.sleep(1)


end_after_argument()
monitor()
