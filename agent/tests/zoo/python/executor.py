"""A ThreadPoolExecutor of 24 workers. It starts another one whenever a task finds none idle."""

import random
import time
from concurrent.futures import ThreadPoolExecutor

from common import end_after_argument

WORKERS = 24


end_after_argument()
random.seed(1)
with ThreadPoolExecutor(max_workers=WORKERS) as executor:
    while True:
        executor.submit(time.sleep, random.uniform(0.5, 2))
        time.sleep(random.expovariate(12))
