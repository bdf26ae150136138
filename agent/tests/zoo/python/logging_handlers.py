"""Configures its logging anew every five seconds. Leaks the file of the handler before."""

import logging
import time

from common import end_after_argument

logger = logging.getLogger("service")


def configure_logging(level):
    logger.addHandler(logging.FileHandler("service.log"))
    logger.setLevel(level)


def supervise():
    while True:
        configure_logging(logging.INFO)
        logger.info("configured")
        time.sleep(5)


end_after_argument()
supervise()
