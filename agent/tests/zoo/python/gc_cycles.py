"""Documents refer to themselves, so their files are closed when the garbage collector comes round."""

import time

from common import end_after_argument


class Node:
    def __init__(self, document):
        self.document = document


class Document:
    def __init__(self, path):
        self.file = open(path)
        self.nodes = [Node(self) for _ in range(20)]

    def length(self):
        return len(self.file.read())


end_after_argument()
while True:
    Document("/etc/hostname").length()
    time.sleep(0.25)
