"""A scan in several runs reads back as one; frames beside the points are kept apart."""

from dataclasses import asdict

import numpy as np
import pytest
from fake_beamline import FakeEiger, poisson, take

from bcmi_beamline import data
from bcmi_beamline.data._load import _JoinedFrames, load_sentinels
from bcmi_beamline.geometry import Geometry

SHAPE = 30, 24
START = {
    "geometry": asdict(Geometry()),
    "window": {"size": 16, "row": 14, "column": 10},
    "detector": {"masked_rows": [], "masked_columns": [], "count_cutoff": 1000},
    "modulator": "out",
    "scan_kind": "rocking",
    "rocking": {"circle": "phi", "peak_deg": 17.7, "sense": 1},
}
CUT = (slice(6, 22), slice(2, 18))
ANGLES = np.linspace(-0.1, 0.1, 12)


def run(catalog, folder, frames, angles, sentinel, **start):
    folder.mkdir()
    eiger = FakeEiger(folder, frames, images_per_file=5)
    values = {
        "diffractometer_phi": 17.7 + angles,
        "monitor_flux": np.full(len(angles), 1e9),
        "sentinel": np.asarray(sentinel, float),
    }
    return take(eiger, values, [catalog.writer], **START, **start)


def test_a_scan_in_three_runs_with_sentinels_is_one(catalog, tmp_path):
    frames = poisson((16, *SHAPE), seed=3)
    order = np.arange(16)
    marks = np.zeros(16)
    marks[[0, 6, 12, 13]] = 1  # one sentinel at the start of each run, one more in the last
    angles = np.zeros(16)
    angles[marks == 0] = ANGLES
    uid = None
    for number, cut in enumerate((slice(0, 6), slice(6, 12), slice(12, 16))):
        more = {"continues": uid} if uid else {}
        uid = run(catalog, tmp_path / str(number), frames[cut], angles[cut], marks[cut], **more)
    catalog.flush()
    scan = data.load(uid, catalog)
    assert scan.angles_deg == pytest.approx(ANGLES, abs=1e-9)
    assert np.array_equal(scan.frames, frames[order[marks == 0]][(slice(None), *CUT)])
    beside = load_sentinels(catalog.run(uid))
    assert np.array_equal(beside.frames, frames[order[marks == 1]][(slice(None), *CUT)])
    assert np.ptp(beside.angles_deg) == 0
    assert np.array_equal(scan.sentinels, np.where(scan.mask, 0, frames[marks == 1][(slice(None), *CUT)]))
    assert scan.sentinel_after.tolist() == [0, 4, 9, 9]  # the first comes before any point


def test_sentinels_are_masked_as_the_frames_they_watch(catalog, tmp_path):
    """One at the cutoff that lost its count, a hot pixel that only the scan's many frames give away."""
    frames = poisson((14, *SHAPE), seed=5).astype(np.uint32)
    frames[:, 10, 10] = 900
    frames[7, 12, 5] = 2**32 - 1
    marks = np.zeros(14)
    marks[[0, 7]] = 1
    angles = np.zeros(14)
    angles[marks == 0] = ANGLES
    uid = run(catalog, tmp_path / "a", frames, angles, marks)
    catalog.flush()
    scan = data.load(uid, catalog)
    assert scan.mask[4, 8] and scan.sentinels.dtype == np.float32
    assert np.all(scan.sentinels[:, 4, 8] == 0)
    assert scan.sentinels[1, 6, 3] == 1000
    assert scan.sentinel_after.tolist() == [0, 5]


def test_a_run_without_sentinels_says_so(catalog, tmp_path):
    frames = poisson((6, *SHAPE), seed=6)
    uid = run(catalog, tmp_path / "a", frames, ANGLES[:6], np.zeros(6))
    catalog.flush()
    assert data.load(uid, catalog).sentinels is None
    with pytest.raises(data.FileError, match="has no sentinels; take the scan with sentinel_every"):
        load_sentinels(catalog.run(uid))


def test_what_is_no_continuation_is_refused(catalog, tmp_path):
    frames = poisson((6, *SHAPE), seed=4)
    first = run(catalog, tmp_path / "a", frames, ANGLES[:6], np.zeros(6))
    other = {**START["rocking"], "peak_deg": 17.8}
    folder = tmp_path / "b"
    folder.mkdir()
    values = {"diffractometer_phi": 17.7 + ANGLES[:6], "monitor_flux": np.ones(6)}
    start = {**START, "rocking": other, "continues": first}
    uid = take(FakeEiger(folder, frames, images_per_file=5), values, [catalog.writer], **start)
    lost = take(
        FakeEiger(folder, frames, images_per_file=5), values, [catalog.writer], **START, continues="0" * 36
    )
    catalog.flush()
    with pytest.raises(data.FileError, match=r"rocking is not that of run .*; load them one by one"):
        data.load(uid, catalog)
    with pytest.raises(data.FileError, match=r"continues run 00000000, which is not here; restore it"):
        data.load(lost, catalog)


def test_blocks_of_joined_frames_are_those_of_the_whole():
    whole = np.arange(7 * 2 * 2).reshape(7, 2, 2)
    joined = _JoinedFrames(whole[:3], whole[3:])
    for begin in range(8):
        for stop in range(begin, 9):
            assert np.array_equal(joined[begin:stop], whole[begin:stop])
