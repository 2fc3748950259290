"""Work done ahead in threads, in order."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
Job = TypeVar("Job")


def prefetch(
    load: Callable[[Job], T], work: Iterable[Job], workers: int, ahead: int
) -> Generator[tuple[Job, T], None, None]:
    """Yields jobs with what was loaded for each, in their order.

    `workers` threads load up to `workers * ahead` jobs early; with 0 each is loaded when it is due.
    """
    if workers == 0:
        for item in work:
            yield item, load(item)
        return
    work = iter(work)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="wavflow-data")
    pending: deque[tuple[Job, Future[T]]] = deque()
    try:
        while True:
            for item in itertools.islice(work, workers * ahead - len(pending)):
                pending.append((item, pool.submit(load, item)))
            if not pending:
                return
            first, future = pending.popleft()
            yield first, future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
