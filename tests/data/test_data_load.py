"""From runs in a real catalogue to scans: windows, masks, angles, positions, saturation; export."""

from dataclasses import asdict, replace
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
from fake_beamline import INVALID, FakeEiger, poisson, take
from hypothesis import given, settings
from hypothesis import strategies as st

from bcmi_beamline import data
from bcmi_beamline.data._clean import find_hot_and_dead
from bcmi_beamline.geometry import Geometry
from bcmi_beamline.scans import PtychographyScan, RockingScan

GEOMETRY = Geometry(modulator_distance=1.35e-3)
CUTOFF = 1000
SHAPE = 30, 24
WINDOW = {"size": 16, "row": 14, "column": 10}
CUT = slice(6, 22), slice(2, 18)
COMMON = {
    "geometry": asdict(GEOMETRY),
    "window": WINDOW,
    "detector": {"masked_rows": [[8, 9]], "masked_columns": [], "count_cutoff": CUTOFF},
    "modulator": "in",
    "modulator_position_um": {"x": 1.5, "y": -2.0, "z": 1350.0, "mchi": 0.9, "mphi": -1.2},
    "sample": "Pt 111",
}
ROCKING = {
    **COMMON,
    "scan_kind": "rocking",
    "rocking": {"circle": "phi", "peak_deg": 17.7, "sense": -1},
    "calibration": {"uid": "abc", "sha256": "0" * 64},
}
PTYCHOGRAPHY = {**COMMON, "scan_kind": "ptychography"}


def rocking_values(points):
    return {
        "diffractometer_phi": 17.7 + np.linspace(-0.1, 0.1, points),
        "monitor_flux": np.linspace(0.9, 1.1, points) * 1e9,
    }


def store(catalog, folder, frames, values, start, **options):
    eiger = FakeEiger(folder, frames, images_per_file=5, pixel_mask=options.pop("pixel_mask", None))
    uid = take(eiger, values, [catalog.writer], **options, **start)
    catalog.flush()
    assert catalog.writer.failures == {}
    return uid


def test_a_rocking_run_becomes_a_rocking_scan(catalog, tmp_path):
    frames = poisson((12, *SHAPE), seed=1)
    pixel_mask = np.zeros(SHAPE, "u4")
    pixel_mask[7, 3] = 2
    frames[:, 10, 12] = INVALID  # a dead pixel that the configuration does not know
    frames[4, 12, 5] = INVALID  # lost for once
    frames[5, 13, 5] = CUTOFF + 7
    uid = store(catalog, tmp_path, frames, rocking_values(12), ROCKING, pixel_mask=pixel_mask)

    scan = data.load(uid, catalog)
    assert isinstance(scan, RockingScan)
    assert scan.frames.dtype == np.float32
    mask = np.zeros((16, 16), bool)
    mask[2:4] = True
    mask[1, 1] = mask[4, 10] = True
    np.testing.assert_array_equal(scan.mask, mask)
    wanted = frames[:, *CUT].astype(np.float32)
    wanted[4, 6, 3] = CUTOFF
    wanted[:, mask] = 0
    np.testing.assert_array_equal(scan.frames, wanted)
    assert (scan.frames >= scan.count_cutoff).sum() == 2
    np.testing.assert_allclose(scan.angles_deg, np.linspace(0.1, -0.1, 12), atol=1e-12)
    np.testing.assert_allclose(scan.flux, np.linspace(0.9, 1.1, 12), rtol=1e-12)
    assert scan.geometry == GEOMETRY
    assert scan.modulator_position == (pytest.approx(1.5e-6), pytest.approx(-2e-6))
    assert scan.metadata["run_uid"] == uid
    assert scan.metadata["calibration"] == ROCKING["calibration"]
    assert scan.metadata["exit_status"] == "success"


def test_the_beam_is_at_the_centre_of_the_window(catalog, tmp_path):
    frames = np.zeros((2, *SHAPE), np.uint32)
    frames[:, WINDOW["row"], WINDOW["column"]] = 9
    scan = data.load(store(catalog, tmp_path, frames, rocking_values(2), ROCKING), catalog)
    assert scan.frames[1, 8, 8] == 9


def test_without_the_modulator_its_distance_is_zero(catalog, tmp_path):
    start = {**ROCKING, "modulator": "out"}
    scan = data.load(store(catalog, tmp_path, poisson((3, *SHAPE)), rocking_values(3), start), catalog)
    assert (scan.modulator_in, scan.modulator_position) == (False, None)


def test_a_ptychography_run_becomes_a_ptychography_scan(catalog, tmp_path):
    frames = poisson((11, *SHAPE), seed=2)
    frames[4, 12, 5], frames[6, 13, 5] = INVALID, CUTOFF
    values = {"nanogoniometer_x": np.linspace(-2, 2, 11), "nanogoniometer_y": np.linspace(3, -1, 11)}
    scan = data.load(store(catalog, tmp_path, frames, values, PTYCHOGRAPHY), catalog)
    assert isinstance(scan, PtychographyScan)
    np.testing.assert_allclose(scan.positions, np.column_stack(list(values.values())) * 1e-6, rtol=1e-12)
    assert scan.wavelength == GEOMETRY.wavelength
    assert scan.propagation_distance == GEOMETRY.propagation_distance
    assert scan.sample_distance == 1.35e-3
    assert scan.flux is None
    # saturated once is not to be used: there is one mask for all frames
    assert np.argwhere(scan.mask[4:]).tolist() == [[2, 3], [3, 3]]


def test_a_frame_taken_twice_belongs_to_no_event(catalog, tmp_path):
    frames = poisson((9, *SHAPE), seed=3)
    uid = store(catalog, tmp_path, frames, rocking_values(8), ROCKING, repeat=(4,))
    scan = data.load(uid, catalog)
    kept = np.delete(frames, 4, axis=0)[:, *CUT]
    np.testing.assert_array_equal(scan.frames[:, ~scan.mask], kept[:, ~scan.mask])


def test_an_aborted_run_gives_the_points_it_has(catalog, tmp_path):
    frames = poisson((9, *SHAPE))
    eiger = FakeEiger(tmp_path, frames, images_per_file=5)
    take(eiger, rocking_values(9), [catalog.writer], fail_at=6, **ROCKING)
    catalog.flush()
    scan = data.load(catalog[-1])
    assert scan.frames.shape == (6, 16, 16)
    assert scan.metadata["exit_status"] == "fail"


def test_frames_come_from_the_server_where_files_are_elsewhere(catalog, tmp_path, monkeypatch):
    uid = store(catalog, tmp_path, poisson((9, *SHAPE)), rocking_values(8), ROCKING, repeat=(4,))
    near = data.load(uid, catalog)
    monkeypatch.setattr("bcmi_beamline.data._load.local_files", lambda image: ([], ""))
    far = data.load(uid, catalog)
    np.testing.assert_array_equal(near.frames, far.frames)
    np.testing.assert_array_equal(near.mask, far.mask)


@pytest.mark.parametrize("kind", ["rocking", "ptychography"])
def test_export_is_what_load_gives(catalog, tmp_path, kind, monkeypatch):
    frames = poisson((12, *SHAPE), seed=4)
    frames[3, 12, 5] = INVALID
    values = rocking_values(12)
    start = ROCKING
    if kind == "ptychography":
        values = {"nanogoniometer_x": np.arange(12.0), "nanogoniometer_y": np.arange(12.0) ** 2}
        start = PTYCHOGRAPHY
    uid = store(catalog, tmp_path, frames, values, start)
    monkeypatch.setattr("bcmi_beamline.data._clean.BLOCK_BYTES", 5 * 16 * 16 * 4)  # many small blocks
    data.export(catalog.run(uid), tmp_path / "a.cxi")
    loaded, exported = data.load(uid, catalog), data.load(tmp_path / "a.cxi")
    for name, value in vars(loaded).items():
        other = getattr(exported, name)
        if isinstance(value, np.ndarray):
            np.testing.assert_allclose(other, value, rtol=1e-14)
        elif isinstance(value, dict):
            assert other == value
        else:
            assert other == (pytest.approx(value) if isinstance(value, float | tuple) else value)


def test_export_reads_only_a_block_at_a_time(catalog, tmp_path, monkeypatch):
    from bcmi_beamline.data import _load

    monkeypatch.setattr("bcmi_beamline.data._clean.BLOCK_BYTES", 2000)
    uid = store(catalog, tmp_path, poisson((12, *SHAPE)), rocking_values(12), ROCKING)
    most, read = [], _load._LocalFrames.read
    monkeypatch.setattr(
        _load._LocalFrames,
        "read",
        lambda self, wanted, cut: most.append(len(wanted)) or read(self, wanted, cut),
    )
    data.export(catalog.run(uid), tmp_path / "a.cxi")
    assert max(most) == 1


@pytest.fixture(scope="module")
def stored(catalog, tmp_path_factory):
    """One good rocking run of two points."""
    folder = tmp_path_factory.mktemp("stored")
    return catalog.run(store(catalog, folder, poisson((2, *SHAPE)), rocking_values(2), ROCKING))


class Edited:
    """A stored run with another start document and other readings."""

    def __init__(self, run, start, values):
        self._run, self._values = run, values
        uid = run.metadata["start"]["uid"]
        self.metadata = {**run.metadata, "start": {**start, "uid": uid}} if start else run.metadata

    def __contains__(self, name):
        return name in self._run

    def __getitem__(self, name):
        return _EditedStream(self._run[name], self._values)


class _EditedStream:
    def __init__(self, stream, values):
        self._stream, self._values = stream, values

    def __iter__(self):
        return iter(self._stream)

    def __getitem__(self, key):
        return self._stream[key]

    def read(self, keys):
        found = {key: self._stream.read([key])[key] for key in keys}
        return found | {k: SimpleNamespace(values=v) for k, v in self._values.items() if k in keys}


def without(start, *keys):
    return {key: value for key, value in start.items() if key not in keys}


@pytest.mark.parametrize(
    ("start", "values", "what"),
    [
        ({**ROCKING, "scan_kind": "alignment"}, {}, "scan_kind is 'alignment'"),
        (without(ROCKING, "scan_kind"), {}, "has no scan_kind"),
        (without(ROCKING, "window"), {}, "has no window.size"),
        (without(ROCKING, "rocking"), {}, "has no rocking.circle"),
        ({**ROCKING, "geometry": {"energy_ev": -1.0}}, {}, "energy_ev must be positive"),
        ({**ROCKING, "geometry": {"energy": 1.0}}, {}, "geometry: "),
        ({**ROCKING, "window": {**WINDOW, "row": 2}}, {}, "does not lie on a detector of (30, 24)"),
        (PTYCHOGRAPHY, {}, "has no nanogoniometer_x"),
        (ROCKING, {"diffractometer_phi": np.array([17.7, np.nan])}, "no finite numbers"),
        (
            {**ROCKING, "detector": {**ROCKING["detector"], "masked_rows": [[0, 29]]}},
            {},
            "every pixel is masked",
        ),
    ],
)
def test_what_a_run_lacks_is_one_clear_line(stored, start, values, what):
    run = Edited(stored, start, values)
    with pytest.raises(data.FileError) as caught:
        data.load(run)
    assert str(caught.value).startswith(f"run {stored.metadata['start']['uid'][:8]}: ")
    assert what in str(caught.value)
    assert "\n" not in str(caught.value)


def test_lost_detector_files_are_one_clear_line(catalog, tmp_path):
    uid = store(catalog, tmp_path, poisson((7, *SHAPE)), rocking_values(7), ROCKING)
    last = sorted(tmp_path.glob("*_data_*.h5"))[-1]
    last.write_bytes(last.read_bytes()[:600])
    with pytest.raises(data.FileError, match=r"_data_000002\.h5: /entry/data/data: cannot be read"):
        data.load(uid, catalog)


def test_a_file_that_is_still_written_is_read(tmp_path):
    from bcmi_beamline.data._load import _LocalFrames

    frames = poisson((3, *SHAPE))
    with h5py.File(tmp_path / "a.h5", "w", libver="latest") as file:
        growing = file.create_dataset(
            "/entry/data/data", (2, *SHAPE), "u4", maxshape=(None, *SHAPE), chunks=(1, *SHAPE)
        )
        file.swmr_mode = True
        growing[:] = frames[:2]
        growing.flush()
        source = _LocalFrames([tmp_path / "a.h5"], "/entry/data/data")
        np.testing.assert_array_equal(source.read(np.array([1, 0]), CUT), frames[[1, 0], *CUT])


def test_other_sources_are_one_clear_line(catalog, tmp_path):
    with pytest.raises(ValueError, match="is no file; give the catalogue"):
        data.load("0123456789")
    with pytest.raises(ValueError, match="is no run"):
        data.load(42)
    with pytest.raises(data.FileError, match="does not exist"):
        data.load("none.cxi")
    with pytest.raises(ValueError, match="no export format 'edf'; available: cxi, nexus, id01"):
        data.export(catalog, tmp_path / "a.edf", format="edf")


# -- bad pixels -------------------------------------------------------------------------------------
def far_field(rng, frames=24, n=64, grain=4.0):
    """Speckle of `grain` pixels in a steep envelope, Poisson counts, uint32 (frames, n, n)."""
    y, x = np.mgrid[:n, :n] - n // 2
    aperture = np.hypot(y, x) < n / (2 * grain)
    waves = aperture * np.exp(2j * np.pi * rng.random((frames, n, n)))
    speckle = np.abs(np.fft.fftshift(np.fft.fft2(waves), axes=(1, 2))) ** 2
    envelope = 1 / (1 + np.hypot(y, x) / grain) ** 3
    pattern = speckle * envelope
    return rng.poisson(3e4 * pattern / pattern.sum(axis=(1, 2), keepdims=True)).astype(np.uint32)


def judged(frames, mask=None):
    mask = np.zeros(frames.shape[1:], bool) if mask is None else mask
    total = frames.sum(axis=0, dtype=float) - frames.max(axis=0)
    return find_hot_and_dead(total, np.count_nonzero(frames, axis=0), len(frames), mask)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), grain=st.sampled_from([2.5, 4.0, 8.0]))
def test_a_far_field_has_no_bad_pixels(seed, grain):
    assert not judged(far_field(np.random.default_rng(seed), grain=grain)).any()


def test_hot_and_dead_pixels_are_found_and_nothing_else():
    rng = np.random.default_rng(5)
    frames = far_field(rng)
    frames[:, 5, 7] += rng.poisson(30, len(frames)).astype(np.uint32)
    frames[:, 60, 2] = rng.poisson(12, len(frames))
    frames[:, 33, 30] = 0
    frames[9, 20, 50] += 5000  # one cosmic ray condemns no pixel
    assert np.argwhere(judged(frames)).tolist() == [[5, 7], [33, 30], [60, 2]]


def test_masked_pixels_judge_no_others():
    frames = far_field(np.random.default_rng(6))
    mask = np.zeros((64, 64), bool)
    mask[:, 31] = True
    frames[:, mask] = 0
    assert not judged(frames, mask).any()


def test_few_frames_are_not_judged():
    frames = np.zeros((4, 16, 16), np.uint32)
    frames[:, 3, 3] = 100
    assert not judged(frames).any()


def test_geometry_of_another_arm_travels(catalog, tmp_path):
    start = {**ROCKING, "geometry": asdict(replace(GEOMETRY, arm="vertical", arm_sign=-1))}
    scan = data.load(store(catalog, tmp_path, poisson((2, *SHAPE)), rocking_values(2), start), catalog)
    assert (scan.geometry.arm, scan.geometry.arm_sign) == ("vertical", -1)
