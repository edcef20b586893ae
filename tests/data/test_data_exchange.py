"""Files that other programs open, opened by those programs; and files by others, read here."""

import json
import shutil
import tracemalloc
from dataclasses import replace

import h5py
import hdf5plugin
import numpy as np
import pytest
from test_data_cxi import assert_same, ptychography, rocking

from bcmi_beamline import data
from bcmi_beamline.geometry import Geometry

pytestmark = pytest.mark.filterwarnings("ignore")  # what others warn of is theirs

ARMS = [("horizontal", 1), ("horizontal", -1), ("vertical", 1), ("vertical", -1)]


def scan(arm="horizontal", sign=1, **metadata):
    geometry = Geometry(modulator_distance=1.357e-3, arm=arm, arm_sign=sign)
    found = rocking(9, 32, 30, geometry=geometry, dtype=np.float32)
    found.frames[:, found.mask] = 0
    found.metadata |= {"scan_id": 3, "sample": "Pt", "exposure_s": 0.5, **metadata}
    return found


# -- ID01 -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("arm", "sign"), ARMS)
def test_cdiutils_reads_frames_angles_and_q(tmp_path, arm, sign):
    pytest.importorskip("cdiutils")
    from cdiutils.converter import SpaceConverter
    from cdiutils.geometry import Geometry as Setup
    from cdiutils.io import ID01Loader

    ours = scan(arm, sign)
    data.write_id01(tmp_path / "a.h5", ours)
    loader = ID01Loader(experiment_file_path=str(tmp_path / "a.h5"), scan=3, sample_name="Pt")
    assert loader.detector_name == "eiger2M"
    np.testing.assert_array_equal(loader.load_detector_data(), ours.frames)
    assert tuple(loader.load_detector_shape()) == (32, 30)
    angles = loader.load_motor_positions()
    assert loader.load_energy() == pytest.approx(9000)
    converter = SpaceConverter(
        Setup.from_setup("id01"), loader.load_det_calib_params(), loader.load_energy(), roi=[0, 32, 0, 30]
    )
    converter.init_q_space(**angles)

    def q(*index):  # in the crystal, (x, y, z) here from their (beam, outboard, up)
        along, outboard, up = converter.index_det_to_q_lab(index)
        return 1e10 * np.array([outboard, up, along])

    geometry, peak = ours.geometry, (4, 16, 15)
    np.testing.assert_allclose(q(*peak), geometry.q_vector, atol=1e-5 * geometry.q_norm)
    step = geometry.wavenumber * geometry.pixel_size / geometry.detector_distance
    np.testing.assert_allclose(q(4, 16, 16) - q(*peak), step * geometry.detector_frame[0], atol=0.01 * step)
    np.testing.assert_allclose(q(4, 15, 15) - q(*peak), step * geometry.detector_frame[1], atol=0.01 * step)
    turned = np.deg2rad(ours.angles_deg[5] - ours.angles_deg[4])
    against = -turned * np.cross(geometry.rocking_axis, geometry.q_vector)
    np.testing.assert_allclose(q(5, 16, 15) - q(*peak), against, atol=0.01 * np.linalg.norm(against))


@pytest.mark.parametrize(("arm", "sign"), ARMS)
def test_the_id01_layout_comes_back(tmp_path, arm, sign):
    ours = scan(arm, sign, rocking={"circle": "phi", "peak_deg": 17.7, "sense": -1})
    data.write_id01(tmp_path / "a.h5", ours)
    back = data.load(tmp_path / "a.h5")
    np.testing.assert_array_equal(back.frames, ours.frames)
    np.testing.assert_array_equal(back.mask, ours.mask)
    np.testing.assert_allclose(back.angles_deg, ours.angles_deg, atol=1e-12)
    assert vars(back.geometry) == pytest.approx(vars(ours.geometry))
    assert back.modulator_position == ours.modulator_position
    assert back.metadata == ours.metadata


def test_the_id01_layout_of_ptychography(tmp_path):
    ours = ptychography(n=16)
    data.write_id01(tmp_path / "a.h5", ours)
    with h5py.File(tmp_path / "a.h5") as file:
        motors = file["sample_1.1/instrument/positioners"]
        np.testing.assert_allclose(motors["pix"], ours.positions[:, 0] * 1e6)
        assert motors["pix"].attrs["units"] == "um"
        assert motors["mononrj"][()] == pytest.approx(9.0, rel=1e-4)


def foreign_id01(path, frames, eta, row, column, nu=-35.0):
    """What BLISS writes: the whole detector, circles from their own zero."""
    with h5py.File(path, "w") as file:
        group = file.create_group("B12_S1_7.1")
        group["measurement/mpx1x4"] = frames
        motors = {"eta": 0.3, "phi": eta, "nu": nu, "delta": 0.2, "mononrj": 9.0}
        for name, value in motors.items():
            group[f"instrument/positioners/{name}"] = value
        detector = {"distance": 1.0, "x_pixel_size": 55e-6, "y_pixel_size": 55e-6}
        detector |= {"beam_center_x": float(column), "beam_center_y": float(row)}
        for name, value in detector.items():
            group[f"instrument/mpx1x4/{name}"] = value


def peak(shape, at, width=1.5, counts=500.0):
    j, y, x = (np.arange(n) - c for n, c in zip(shape, at, strict=True))
    square = (j**2)[:, None, None] + (y**2)[:, None] + x**2
    return np.random.default_rng(4).poisson(counts * np.exp(-square / (2 * width**2)))


def test_a_foreign_id01_file_is_cropped_around_its_peak(tmp_path):
    frames = peak((21, 80, 60), (12, 50, 20)).astype(np.int32)
    frames[:, 5, 40] = 10**6  # a hot pixel is no peak
    foreign_id01(tmp_path / "a.h5", frames, np.linspace(-16.9, -17.1, 21), row=40, column=30)
    found = data.load(tmp_path / "a.h5", window=32)
    assert found.frames.shape == (21, 32, 32)
    assert np.unravel_index(found.frames.sum(axis=0).argmax(), (32, 32)) == (16, 16)
    assert abs(found.angles_deg[12]) < 0.002
    assert found.angles_deg[13] > found.angles_deg[12]  # phi turns about -y
    two_theta = 35.0 + np.rad2deg(np.arctan(-10 * 55e-6))
    assert np.rad2deg(found.geometry.two_theta) == pytest.approx(two_theta, abs=1e-9)
    assert (found.geometry.arm, found.geometry.arm_sign) == ("horizontal", 1)
    foreign_id01(tmp_path / "b.h5", frames, np.linspace(-16.9, -17.1, 20), row=40, column=30)
    with pytest.raises(data.FileError, match="20 angles for 21 frames"):
        data.load(tmp_path / "b.h5", window=32)
    with pytest.raises(data.FileError, match="choose a window of 2 to 40, not 64"):
        data.load(tmp_path / "a.h5", window=64)


# -- Eiger ------------------------------------------------------------------------------------------
def eiger_master(folder, frames, layout="external", per_file=8, **more):
    """A DECTRIS master file and its data files."""
    names = []
    for number, start in enumerate(range(0, len(frames), per_file), 1):
        names.append(f"x_data_{number:06d}.h5")
        with h5py.File(folder / names[-1], "w") as file:
            file.create_dataset(
                "/entry/data/data",
                data=frames[start : start + per_file],
                chunks=(1, *frames.shape[1:]),
                **hdf5plugin.Bitshuffle(cname="lz4"),
            )
    detector = "/entry/instrument/detector"
    with h5py.File(folder / "x_master.h5", "w", libver="latest") as file:
        if layout == "external":
            for number, name in enumerate(names, 1):
                file[f"/entry/data/data_{number:06d}"] = h5py.ExternalLink(name, "/entry/data/data")
        else:
            whole = h5py.VirtualLayout(frames.shape, frames.dtype)
            for number, name in enumerate(names):
                part = slice(number * per_file, min((number + 1) * per_file, len(frames)))
                shape = (part.stop - part.start, *frames.shape[1:])
                whole[part] = h5py.VirtualSource(name, "/entry/data/data", shape)
            file.create_virtual_dataset("/entry/data/data", whole)
        mask = np.zeros(frames.shape[1:], "u4")
        mask[45:47] = 1
        content = {
            "/entry/instrument/beam/incident_wavelength": 1.3776,
            "/entry/sample/goniometer/omega": np.linspace(10, 10.2, len(frames)),
            f"{detector}/goniometer/two_theta": np.full(len(frames), 35.0),
            f"{detector}/detector_distance": 1.0,
            f"{detector}/x_pixel_size": 75e-6,
            f"{detector}/y_pixel_size": 75e-6,
            f"{detector}/beam_center_x": 30.0,
            f"{detector}/beam_center_y": 40.0,
            f"{detector}/detectorSpecific/pixel_mask": mask,
            f"{detector}/detectorSpecific/countrate_correction_count_cutoff": 100000,
        } | more
        for name, value in content.items():
            file[name] = value
    return folder / "x_master.h5"


@pytest.mark.parametrize("layout", ["external", "virtual"])
def test_an_eiger_master_file_is_read(tmp_path, layout):
    frames = peak((21, 80, 60), (12, 50, 20)).astype(np.uint32)
    frames[:, 45:47] = 2**32 - 1
    found = data.load(eiger_master(tmp_path, frames, layout), window=32)
    cut = slice(34, 66), slice(4, 36)
    good = np.where(found.mask, 0, frames[:, *cut])
    np.testing.assert_array_equal(found.frames, good)
    assert np.flatnonzero(found.mask.all(axis=1)).tolist() == [11, 12]
    assert found.geometry.wavelength == pytest.approx(1.3776e-10)
    assert abs(found.angles_deg[12]) < 0.002
    other = np.linspace(1, 0, 21)
    assert data.load(tmp_path / "x_master.h5", angles_deg=other).angles_deg[0] > 0
    straight = data.load(tmp_path / "x_master.h5", two_theta_deg=-20.0)
    assert straight.geometry.arm_sign == -1


@pytest.mark.parametrize("layout", ["external", "virtual"])
def test_an_eiger_file_without_its_data_is_one_clear_line(tmp_path, layout):
    master = eiger_master(tmp_path, peak((21, 80, 60), (12, 50, 20)).astype(np.uint32), layout)
    (tmp_path / "x_data_000002.h5").unlink()
    with pytest.raises(data.FileError, match=r"x_data_000002\.h5, which is not there"):
        data.load(master)


def test_fabio_and_silx_open_the_eiger_files_of_a_run(tmp_path):
    fabio, silx = pytest.importorskip("fabio"), pytest.importorskip("silx.io")
    frames = peak((21, 80, 60), (12, 50, 20)).astype(np.uint32)
    master = eiger_master(tmp_path, frames)
    with fabio.open(str(tmp_path / "x_data_000002.h5")) as image:
        np.testing.assert_array_equal(image.data, frames[8])
        assert image.nframes == 8
    with silx.open(str(master)) as file:
        np.testing.assert_array_equal(file["/entry/data/data_000003"][4], frames[20])


# -- NeXus ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("content", [scan(), scan("vertical", -1), ptychography(n=16)], ids=repr)
def test_the_nexus_validator_finds_no_error(tmp_path, content, caplog):
    validate = pytest.importorskip("nexusformat.nexus.validate")
    data.write_nexus(tmp_path / "a.nxs", content)
    validate.logger.propagate = True
    with caplog.at_level("ERROR"):
        validate.validate_application(str(tmp_path / "a.nxs"))
        assert [record.message for record in caplog.records if record.levelname == "ERROR"] == []
        validate.validate_file(str(tmp_path / "a.nxs"))
    (message,) = [record.message for record in caplog.records if record.levelname == "ERROR"]
    assert "NXsource is an invalid class in NXentry" in message  # where NXmx wants it
    caplog.clear()
    with h5py.File(tmp_path / "a.nxs", "r+") as file:  # it does look
        del file["entry/instrument/detector/module"]
    with caplog.at_level("ERROR"):
        validate.validate_application(str(tmp_path / "a.nxs"))
    assert [record for record in caplog.records if record.levelname == "ERROR"]


@pytest.mark.parametrize(("arm", "sign"), ARMS)
def test_nexus_puts_every_pixel_where_it_is(tmp_path, arm, sign):
    """The chain of motions from the file alone, against the frames of the geometry."""
    ours = scan(arm, sign)
    data.write_nexus(tmp_path / "a.nxs", ours)
    with h5py.File(tmp_path / "a.nxs") as file:
        detector = file["entry/instrument/detector"]
        place = np.zeros(3)
        for name, index in (("fast_pixel_direction", 20), ("slow_pixel_direction", 3)):
            step = detector[f"module/{name}"]
            place += index * step[0] * step.attrs["vector"]
        place += step.attrs["offset"]
        after = step.attrs["depends_on"]
        while after != ".":
            motion = file[after]
            place = moved(place, motion[0], motion.attrs)
            after = motion.attrs["depends_on"]
        calibration = {name: value.asstr()[()] for name, value in file["entry/calibration"].items()}
        assert json.loads(file["entry/metadata/data"][()])["sample"] == "Pt"
    across, up, along = ours.geometry.detector_frame
    pixel = ours.geometry.pixel_size
    wanted = (20 - 15) * pixel * across - (3 - 16) * pixel * up + ours.geometry.detector_distance * along
    np.testing.assert_allclose(place, wanted, atol=1e-12)
    assert calibration == ours.metadata["calibration"]


def moved(place, value, attributes):
    from bcmi_beamline.geometry import rotation_matrix

    if attributes["transformation_type"] == "translation":
        return place + value * attributes["vector"]
    return rotation_matrix(attributes["vector"], np.deg2rad(value)) @ place


# -- CXI --------------------------------------------------------------------------------------------
def test_cxi_opens_without_plugins(tmp_path):
    """Programs for ptychography bring no filter: gzip only."""
    data.write_cxi(tmp_path / "a.cxi", ptychography())
    with h5py.File(tmp_path / "a.cxi") as file:
        assert file["entry_1/data_1/data"].compression == "gzip"


def test_cdtools_reconstructs_our_ptychography_file(tmp_path):
    cdtools = pytest.importorskip("cdtools")
    ours = ptychography(j=6, n=32)
    data.write_cxi(tmp_path / "a.cxi", ours)
    dataset = cdtools.datasets.Ptycho2DDataset.from_cxi(str(tmp_path / "a.cxi"))
    np.testing.assert_allclose(dataset.patterns.numpy(), ours.frames)
    np.testing.assert_allclose(dataset.translations.numpy()[:, :2], ours.positions, rtol=1e-5)
    assert dataset.wavelength == pytest.approx(ours.wavelength)
    model = cdtools.models.FancyPtycho.from_dataset(dataset)
    losses = list(model.Adam_optimize(2, dataset, batch_size=3))
    assert losses[1] < losses[0]


def test_files_are_told_apart(tmp_path):
    ours = replace(scan(), frames=scan().frames.astype(np.uint32))
    data.write_cxi(tmp_path / "a.h5", ours)
    assert_same(ours, data.load(tmp_path / "a.h5"))
    shutil.copy(tmp_path / "a.h5", tmp_path / "b.nxs")
    assert_same(ours, data.load(tmp_path / "b.nxs"))


class Endless:
    """Frames that are made when sliced."""

    dtype, ndim = np.dtype(np.float32), 3

    def __init__(self, *shape):
        self.shape = shape

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, key):
        return np.ones((len(range(*key.indices(len(self)))), *self.shape[1:]), np.float32)


@pytest.mark.parametrize("write", [data.write_cxi, data.write_nexus, data.write_id01])
def test_export_takes_no_more_memory_than_a_few_blocks(tmp_path, monkeypatch, write):
    monkeypatch.setattr("bcmi_beamline.data._clean.BLOCK_BYTES", 2**20)
    ours = ptychography(j=256, n=256)
    ours = replace(ours, frames=np.zeros((256, 1, 1)), mask=np.zeros((1, 1), bool))
    ours.frames, ours.mask = Endless(256, 256, 256), np.zeros((256, 256), bool)  # 67 MB
    tracemalloc.start()
    write(tmp_path / "a.h5", ours)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 8 * 2**20
    with h5py.File(tmp_path / "a.h5") as file:
        sizes = []
        file.visititems(lambda _, item: sizes.append(item.size) if isinstance(item, h5py.Dataset) else None)
    assert max(sizes) == 256**3


def test_a_summary_says_what_was_measured():
    ours = scan(run_uid="3f2a9c11-77", exit_status="success")
    ours.frames[3, 4, 5] = ours.count_cutoff
    text = data.summary(ours)
    for part in (
        "9 frames of 32 x 30, modulator in", "Pt (run 3f2a9c11, success)", "9000.0 eV, detector at 5.350 m",
        "two theta 35.404 deg", "-0.2500 to +0.2500 deg in steps of 0.0625", "1 of 960 pixels (0.1 %)",
        "1 counts at the cutoff", "monitor       varies by", "calibration   run u",
    ):  # fmt: skip
        assert part in text
    assert max(map(len, text.splitlines())) < 110
    assert "4 frames of 8 x 8" in data.summary(ptychography())
