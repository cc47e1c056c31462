"""Prefetching of an iterator by a background thread."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class ReadAhead(Generic[T]):
    """Iterator over items that a thread prefetches; an error in the thread is raised in the consumer.

    `wait_s` is the total time in seconds for which the consumer waited.
    """

    def __init__(self, items: Iterator[T], depth: int) -> None:
        self.wait_s = 0.0
        self._items = items
        self._queue: queue.Queue[T | BaseException] = queue.Queue(depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._read_ahead, name="read-ahead", daemon=True)
        self._thread.start()

    def __iter__(self) -> ReadAhead[T]:
        return self

    def __next__(self) -> T:
        if self._closed.is_set():
            raise StopIteration
        start = time.perf_counter()
        item = self._queue.get()
        self.wait_s += time.perf_counter() - start
        if isinstance(item, BaseException):
            self.close()
            try:
                raise item
            finally:
                del item  # an error refers to this frame
        return item

    def close(self) -> None:
        """Stop reading, wait for the thread to end and drop what it has read."""
        self._closed.set()
        while self._thread.is_alive():
            with self._queue.mutex:  # make room for a reader thread that is blocked in put
                self._queue.queue.clear()
                self._queue.not_full.notify_all()
            self._thread.join(0.01)
        with self._queue.mutex:
            self._queue.queue.clear()  # an error refers to this object

    def _read_ahead(self) -> None:
        try:
            for item in self._items:
                self._queue.put(item)
                if self._closed.is_set():
                    return
            self._queue.put(StopIteration())
        except BaseException as error:  # pass on every error: a dead thread would hang the consumer
            self._queue.put(error)
