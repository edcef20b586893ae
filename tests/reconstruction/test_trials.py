"""Trials: the same wherever they run, kept as they finish, never mixed up."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pytest

from bcmi_beamline.reconstruction.trials import fingerprint, run_trials


@dataclass
class Found:
    value: np.ndarray
    history: list[float] = field(default_factory=list)
    where: int | None = None
    nothing: np.ndarray | None = None


@dataclass
class Draw:
    seed: int
    fails_from: int = 99
    outcome: ClassVar[type] = Found

    def settings(self) -> dict[str, Any]:
        return {"seed": self.seed}

    def __call__(self, number, report, /):
        if number >= self.fails_from:
            raise KeyboardInterrupt
        report(0.5, "half way")
        rng = np.random.default_rng((self.seed, number))
        return Found(rng.normal(size=3).astype(np.float32), [1.0, 0.5], os.getpid())


def values(found):
    return np.array([f.value for f in found])


def test_processes_give_what_one_process_gives(tmp_path):
    here = run_trials(Draw(4), 5)
    there = run_trials(Draw(4), 5, workers=2, folder=tmp_path)
    np.testing.assert_array_equal(values(here), values(there))
    assert {f.where for f in here} == {os.getpid()} and os.getpid() not in {int(f.where) for f in there}
    assert not list(tmp_path.glob("*.job"))


def test_an_interrupted_series_goes_on_where_it_stopped(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run_trials(Draw(4, fails_from=3), 5, folder=tmp_path)
    assert len(list(tmp_path.glob("trial-*.npz"))) == 3
    lines = []
    again = run_trials(Draw(4), 5, folder=tmp_path, progress=lambda part, line: lines.append((part, line)))
    np.testing.assert_array_equal(values(again), values(run_trials(Draw(4), 5)))
    assert lines[0] == (0.7, "trial 4 of 5: half way") and lines[-1][0] == 1.0
    assert again[0].nothing is None and list(again[0].history) == [1.0, 0.5]


def test_a_picture_is_drawn_as_trials_end_and_stops_nothing(tmp_path):
    seen, lines = [], []

    def draw(found):
        seen.append(len(found))
        if len(found) == 2:
            raise OSError("disk full")

    run_trials(Draw(4), 1, folder=tmp_path)
    found = run_trials(Draw(4), 4, folder=tmp_path, found=draw, progress=lambda _, line: lines.append(line))
    np.testing.assert_array_equal(values(found), values(run_trials(Draw(4), 4)))
    assert seen == [2, 3, 4]
    assert lines.count("no picture: disk full") == 1


def test_trials_of_another_job_are_refused(tmp_path):
    run_trials(Draw(4), 1, folder=tmp_path)
    with pytest.raises(ValueError, match="other data or settings"):
        run_trials(Draw(5), 1, folder=tmp_path)


def test_a_dask_scheduler_gives_what_one_process_gives():
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None
    ) as c:
        there = run_trials(Draw(4), 3, scheduler=c.scheduler_address)
    np.testing.assert_array_equal(values(there), values(run_trials(Draw(4), 3)))


def test_a_fingerprint_tells_arrays_apart():
    a = np.arange(6.0)
    assert fingerprint(a) == fingerprint(a.copy()) != fingerprint(a.reshape(2, 3))
    assert fingerprint(a) != fingerprint(a.astype(np.float32))
