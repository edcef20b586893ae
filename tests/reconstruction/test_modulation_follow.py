"""A crystal that grows while its rocking curve is taken."""

from __future__ import annotations

import importlib
import itertools
import time
from dataclasses import replace

import numpy as np
import pytest
from test_modulation_engine import ANGLES, correlate, make_geometry, make_modulator, simulate

from bcmi_beamline.reconstruction import modulation
from bcmi_beamline.reconstruction.modulation.chain import BRIGHT
from bcmi_beamline.reconstruction.modulation.follow import Follower, carried
from bcmi_beamline.reconstruction.modulation.prepare import prepare
from bcmi_beamline.reconstruction.threads import one_thread_per_product

follow_module = importlib.import_module("bcmi_beamline.reconstruction.modulation.follow")


@pytest.fixture(scope="module")
def scan():
    return simulate(make_geometry(), ANGLES)


def cut(scan, frames):
    flux = None if scan.flux is None else scan.flux[frames]
    return replace(scan, frames=scan.frames[frames], angles_deg=scan.angles_deg[frames], flux=flux)


def growing(scan, *sizes):
    """The scan with its first frames, as a run shows it that is still being written."""
    return (cut(scan, slice(0, n)) for n in sizes)


def patient(scans, there):
    """The same, but at the end there are no new frames until `there` holds: a slower scan."""
    for scan in scans:
        yield scan
    for _ in range(1000):
        if there():
            return
        time.sleep(0.02)
        yield scan


@pytest.fixture
def one_thread():
    with one_thread_per_product():
        yield


def draft(follower, scan, before=None):
    return follower.draft(scan, np.arange(len(scan.frames)), before, 4, "none")()


def drafted(scan, size):
    """A follower that has all frames, and a crystal from the first `size` of them."""
    follower = Follower(make_modulator(scan.geometry, with_probe=True))
    part = cut(scan, slice(0, size))
    follower.add(part)
    while follower.catch_up():
        pass
    before = draft(follower, part)
    follower.add(scan)
    while follower.catch_up():
        pass
    return follower, before


def test_frames_are_solved_as_they_come_and_the_crystal_is_that_of_the_finished_scan(scan):
    modulator = make_modulator(scan.geometry, with_probe=True)
    lines, seen = [], []
    found = modulation.follow(
        itertools.chain(patient(growing(scan, *range(2, 28, 5)), lambda: seen), growing(scan, 34, 41)),
        modulator,
        drift="none",
        preview=11,
        progress=lambda fraction, line: lines.append((fraction, line)),
        show=seen.append,
    )
    offline = modulation.reconstruct(scan, modulator, iterations=6, start="probe", drift="none")
    assert correlate(found) == pytest.approx(correlate(offline), abs=0.01)
    assert correlate(found) > 0.97
    assert len(seen) >= 2 and seen[-1] is found
    assert correlate(seen[0]) > 0.8
    assert 11 <= seen[0].configuration["frames"] < 27 < 41 == found.configuration["frames"]
    assert "41 frames" in "".join(line for _, line in lines)


def test_the_chain_waits_for_the_peak_and_then_grows_both_ways(scan):
    follower = Follower(make_modulator(scan.geometry, with_probe=True))
    light = scan.frames[:, ~scan.mask].sum(axis=1)
    brightest = int(np.argmax(light))
    behind = []
    for n in range(2, 42):
        follower.add(cut(scan, slice(0, n)))
        for _ in range(2):  # there is time for this
            follower.catch_up()
        if follower.begun < 0:
            assert n <= brightest + 4
        else:
            faint = light[n - 1] < 0.05 * light.max()
            assert n - 1 in follower.solved or faint  # a frame is solved when it comes
            behind.append(min(follower.solved))
    assert abs(follower.begun - brightest) < 4
    assert behind == sorted(behind, reverse=True) and behind[-1] < behind[0]
    assert light[: behind[-1]].max() < 0.05 * light.max()  # nothing bright is left behind
    assert follower.light_is_over() == (light[-3:].max() < BRIGHT * light.max())


def test_a_picture_is_made_from_as_many_frames_on_either_side(scan):
    follower = Follower(make_modulator(scan.geometry, with_probe=True))
    follower.add(cut(scan, slice(0, 27)))
    while follower.catch_up():
        assert len(follower.around()) < 2 * (26 - follower.begun) + 1  # some are not solved yet
    first, last = follower.around()[[0, -1]]
    assert last == 26 and follower.begun - first == 26 - follower.begun


@pytest.mark.usefixtures("one_thread")
def test_a_crystal_is_carried_over_to_a_scan_that_has_grown(scan):
    """It makes the same waves, though its voxels have become smaller."""
    lit = replace(scan, flux=np.where(np.arange(41) < 30, 1.0, 3.0))
    follower, before = drafted(lit, 30)
    problem = prepare(lit, follower.modulator, window=before.problem.operator.window)
    before.solution.shifts = np.arange(60.0).reshape(30, 2)
    found = carried(before, lit, np.arange(41), problem)
    assert problem.rocking.voxel < 0.8 * before.problem.rocking.voxel
    waves = before.problem.waves(before.solution.image)
    again = problem.waves(found.image)[:30]
    assert np.linalg.norm(again - waves) < 0.05 * np.linalg.norm(waves)
    assert found.shifts is not None
    np.testing.assert_allclose(found.shifts[:30], before.solution.shifts)
    assert (found.shifts[30:] == before.solution.shifts[-1]).all()


@pytest.mark.usefixtures("one_thread")
def test_the_end_goes_on_from_what_was_fitted_before_and_is_as_good(scan):
    follower, before = drafted(scan, 38)
    assert before.solved == frozenset(follower.solved)  # what came since has no light
    afresh, quick = draft(follower, scan), draft(follower, scan, before)
    assert len(quick.solution.error) == 2 < len(afresh.solution.error)
    assert quick.solution.score < 1.01 * afresh.solution.score
    assert correlate(follower.result(quick)) > correlate(follower.result(afresh)) - 0.003
    before.solution.image = before.solution.image.conj()[:, ::-1, ::-1].copy()  # a wrong one is left aside
    again = draft(follower, scan, before)
    np.testing.assert_array_equal(again.solution.image, afresh.solution.image)


def test_while_no_more_light_comes_the_crystal_is_fitted_to_all_frames(scan, monkeypatch):
    afresh, real = [], follow_module.conclude
    monkeypatch.setattr(follow_module, "conclude", lambda *args: afresh.append(1) or real(*args))
    modulator = make_modulator(scan.geometry, with_probe=True)
    found = modulation.follow(
        itertools.chain(
            patient(growing(scan, *range(2, 39)), lambda: len(afresh)), patient([scan], lambda: True)
        ),
        modulator,
        drift="none",
    )
    assert len(afresh) == 1 and found.configuration["frames"] == 41
    assert correlate(found) > 0.97


def test_a_picture_that_fails_is_told(scan):
    def show(_):
        raise OSError("the disk is full")

    modulator = make_modulator(scan.geometry, with_probe=True)
    with pytest.raises(OSError, match="disk is full"):
        modulation.follow(patient(growing(scan, *range(2, 42)), lambda: False), modulator, show=show)


def test_missing_and_late_angles_do_no_harm(scan):
    """A run that was stopped and resumed: what is missing comes last, and one angle never."""
    order = np.r_[np.arange(0, 24), np.arange(30, 41), np.arange(24, 29)]
    late = cut(scan, order)
    modulator = make_modulator(scan.geometry, with_probe=True)
    found = modulation.follow(growing(late, 20, 24, 35, 40), modulator, drift="none")
    assert correlate(found) > 0.96


def test_light_that_leaves_the_window_has_room_while_the_scan_runs_too(scan):
    rows = slice(32, 96)
    narrow = replace(scan, frames=scan.frames[:, rows], mask=scan.mask[rows])
    modulator = make_modulator(scan.geometry, with_probe=True)
    found = modulation.follow(growing(narrow, *range(20, 40, 2), 41), modulator, drift="none")
    assert found.metadata["border"] == [8, 0]
    assert correlate(found) > 0.97


def test_a_finished_run_is_one_look(scan):
    found = modulation.follow([scan], make_modulator(scan.geometry), drift="none")
    assert correlate(found) > 0.97
    with pytest.raises(ValueError, match="before its first frame"):
        modulation.follow([], make_modulator(scan.geometry))
