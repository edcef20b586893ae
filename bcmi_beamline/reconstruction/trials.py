"""Independent trials side by side: in this process, in several, or on a cluster; they can be resumed.

A trial is a function of a job and a number, and the same wherever it runs. What it found is kept in a folder,
if there is one, as soon as it is found: an interrupted series goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import fields
from multiprocessing import get_context
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

Progress = Callable[[float, str], None]


class Job(Protocol):
    """What a trial needs besides its number; can be pickled."""

    outcome: ClassVar[type]
    """Dataclass of arrays and lists of numbers that a trial returns."""

    def settings(self) -> dict[str, Any]:
        """JSON-serialisable; together with the data they tell whether kept trials may be used again."""
        ...

    def __call__(self, number: int, report: Progress, /) -> Any:
        """Perform trial `number`, telling its own progress from 0 to 1."""
        ...


def run_trials(
    job: Job,
    count: int,
    *,
    workers: int = 1,
    scheduler: str | None = None,
    folder: Path | None = None,
    progress: Progress | None = None,
    found: Callable[[list[Any]], None] | None = None,
) -> list[Any]:
    """Outcomes of trials 0 to `count` - 1, in this order.

    Parameters
    ----------
    job : Job
    count : int
    workers : int
        Processes on this machine, each on its share of the processors; 1 runs the trials here, one after
        another, each on all of them.
    scheduler : str, optional
        Address of a Dask scheduler (``"tcp://host:8786"``), or ``"slurm"`` for `workers` jobs of a SLURM
        cluster as dask-jobqueue is configured.
    folder : Path, optional
        Keeps what every trial found. It must be seen by all workers where there is a scheduler.
    progress : callable, optional
        Given the part of all trials that is done and a line.
    found : callable, optional
        Given the outcomes so far, in the order of their numbers, whenever there is a new one: to draw them.
        What it raises is told in a line and stops nothing.

    Raises
    ------
    ValueError
        When `folder` holds trials of another job, or what the scheduler needs is not installed.
    """
    kept = _Shelf(folder, job) if folder is not None else None
    done: dict[int, Any] = {} if kept is None else kept.outcomes(count)

    def say(part: float, line: str) -> None:
        if progress is not None:
            progress(min(1.0, part / count), line)

    def finished(number: int, outcome: Any) -> None:
        done[number] = outcome
        if kept is not None:
            kept.put(number, outcome)
        if found is not None:
            try:
                found([done[n] for n in sorted(done)])
            except Exception as problem:  # a picture must not cost the trials that it shows
                say(len(done), f"no picture: {problem}")

    left = [n for n in range(count) if n not in done]
    if scheduler is None and (workers == 1 or len(left) < 2):
        for number in left:
            before, last = len(done), [0.0]

            def report(
                part: float, line: str, number: int = number, before: int = before, last: list = last
            ) -> None:
                last[0] = part
                say(before + part, f"trial {number + 1} of {count}: {line}")

            finished(number, job(number, report))
            if last[0] < 1:
                say(len(done), f"trial {number + 1} of {count}: done")
    elif left:
        with _written(job, folder) as path, _pool(min(workers, len(left)), scheduler) as (submit, completed):
            futures = {submit(_perform, path, number): number for number in left}
            for future in completed(futures):
                finished(futures[future], future.result())
                say(len(done), f"{len(done)} of {count} trials")
    return [done[n] for n in range(count)]


def _perform(path: str, number: int) -> Any:
    return _job(path)(number, lambda *_: None)


_loaded: dict[str, Any] = {}


def _job(path: str) -> Any:
    """The job in a file, read once by each worker."""
    if path not in _loaded:
        _loaded.clear()
        with open(path, "rb") as file:
            _loaded[path] = pickle.load(file)
    return _loaded[path]


@contextmanager
def _written(job: Any, folder: Path | None) -> Iterator[str]:
    """A file that holds the job as long as the workers may read it."""
    handle, path = tempfile.mkstemp(suffix=".job", dir=folder)
    try:
        with os.fdopen(handle, "wb") as file:
            pickle.dump(job, file, protocol=5)
        yield path
    finally:
        os.unlink(path)


@contextmanager
def _pool(workers: int, scheduler: str | None) -> Iterator[tuple[Callable[..., Any], Callable[..., Any]]]:
    """``submit`` and ``as_completed`` of processes here or of a cluster."""
    if scheduler is None:
        context = get_context("spawn")  # a fork would copy threads that hold locks
        shares = context.Queue()
        for share in _shares(workers):
            shares.put(share)
        with ProcessPoolExecutor(workers, context, _settle_on, (shares,)) as pool:
            try:
                yield pool.submit, as_completed
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return
    try:
        from distributed import Client
        from distributed import as_completed as completed_there
    except ImportError:
        raise ValueError("trials on a cluster need dask.distributed: pip install distributed") from None
    if scheduler != "slurm":
        with Client(scheduler) as client:
            yield client.submit, completed_there
        return
    try:
        from dask_jobqueue.slurm import SLURMCluster
    except ImportError:
        raise ValueError("trials on SLURM need dask-jobqueue: pip install 'bcmi-beamline[cluster]'") from None
    with SLURMCluster() as cluster, Client(cluster) as client:
        cluster.scale(jobs=workers)  # pyright: ignore[reportAttributeAccessIssue]
        yield client.submit, completed_there


def _shares(workers: int) -> list[list[int]]:
    """Processors of this process, dealt out to workers; all of them to each where there are too few."""
    if not hasattr(os, "sched_getaffinity"):
        return [[] for _ in range(workers)]
    processors = sorted(os.sched_getaffinity(0))
    return [processors[n::workers] or processors[n % len(processors) :][:1] for n in range(workers)]


def _settle_on(shares: Any) -> None:
    """Keep this worker to its processors; the threads of the transforms follow when they are imported."""
    share = shares.get()
    if share:
        os.sched_setaffinity(0, share)


class _Shelf:
    """Outcomes in a folder, one file each."""

    def __init__(self, folder: Path, job: Any) -> None:
        self._folder, self._outcome = folder, job.outcome
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(job.settings(), sort_keys=True, default=str)
        mark, note = hashlib.sha256(text.encode()).hexdigest(), folder / "trials.json"
        if not note.exists():
            _replace(note, lambda beside: beside.write_text(json.dumps({"job": mark, "settings": text})))
        elif json.loads(note.read_text()).get("job") != mark:
            raise ValueError(
                f"{folder}: holds trials of other data or settings; name another folder or empty this one"
            )

    def _path(self, number: int) -> Path:
        return self._folder / f"trial-{number:04d}.npz"

    def put(self, number: int, outcome: Any) -> None:
        values = {f.name: getattr(outcome, f.name) for f in fields(outcome)}
        arrays = {name: np.asarray(value) for name, value in values.items() if value is not None}
        _replace(self._path(number), lambda beside: np.savez(beside, **arrays))  # pyright: ignore[reportArgumentType]

    def outcomes(self, count: int) -> dict[int, Any]:
        outcomes = {}
        for number in range(count):
            if self._path(number).exists():
                with np.load(self._path(number), allow_pickle=False) as file:
                    outcomes[number] = self._outcome(**{name: file[name] for name in file.files})
        return outcomes


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Write beside and rename: never half a file."""
    beside = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        write(beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def fingerprint(*arrays: np.ndarray) -> str:
    """Hash of arrays, so that kept trials are never mixed with those of other data."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(str((array.shape, array.dtype.str)).encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()
