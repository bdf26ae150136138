"""Reports two metrics a second. Leaks the socket that each is sent through: all are in a list."""

import socket
import time

from common import end_after_argument

sockets = []


def send_metric(address, text):
    sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sender.sendto(text.encode(), address)
    sockets.append(sender)


def report(address):
    number = 0
    while True:
        send_metric(address, f"requests:{number}|c")
        number += 1
        time.sleep(0.5)


end_after_argument()
collector = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
collector.bind(("127.0.0.1", 0))
report(collector.getsockname())
