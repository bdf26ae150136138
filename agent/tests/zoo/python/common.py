"""What the Python programs share: how they end, and a peer in a process of its own."""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def end_after_argument():
    """SIGALRM ends the process after the seconds of its first argument."""
    signal.alarm(int(sys.argv[1]))


def fork_peer(function, *arguments):
    """Calls the function in a child, which ends with this process at the latest."""
    parent = os.getpid()
    if os.fork() == 0:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == parent:
            function(*arguments)
        os._exit(0)
