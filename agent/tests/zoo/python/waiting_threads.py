"""Asks a question each second, in a thread that waits for the answer. Leaks them: no answer comes."""

import queue
import threading
import time

from common import end_after_argument


def wait_for_answer(answers):
    print(answers.get())


def ask(question):
    answers = queue.Queue()
    threading.Thread(target=wait_for_answer, args=(answers,), name=question, daemon=True).start()


def client():
    number = 0
    while True:
        ask(f"question-{number}")
        number += 1
        time.sleep(1)


end_after_argument()
client()
