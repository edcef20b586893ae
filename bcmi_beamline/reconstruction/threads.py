"""Frames side by side on the processors of this process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from threading import local
from typing import TypeVar

from threadpoolctl import threadpool_limits

from bcmi_beamline.reconstruction.fourier import WORKERS

Item = TypeVar("Item")
Result = TypeVar("Result")


_here = local()


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(WORKERS, thread_name_prefix="frames")


def each(work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """``[work(item) for item in items]``, as many at a time as there are processors.

    `work` must let go of the interpreter for most of its time (transforms, matrix products, compiled
    loops), use one thread itself, and not call `each`.
    """
    items = list(items)
    if WORKERS == 1 or len(items) == 1 or getattr(_here, "alone", False):
        return [work(item) for item in items]
    return list(_pool().map(work, items))


@contextmanager
def in_this_thread() -> Iterator[None]:
    """Let `each` work in the calling thread, so that what others do with the processors does not wait."""
    _here.alone = True
    try:
        yield
    finally:
        _here.alone = False


@contextmanager
def one_thread_per_product() -> Iterator[None]:
    """Keep matrix products to one thread each while frames run side by side."""
    with threadpool_limits(1, user_api="blas"):
        yield
