"""CXI files: lossless round trips, files by others, and one clear line for every corruption."""

from dataclasses import replace
from pathlib import Path

import h5py
import hdf5plugin
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bcmi_beamline import data
from bcmi_beamline.geometry import Geometry
from bcmi_beamline.scans import Modulator, PtychographyScan, Reconstruction, RockingScan

SHARED = Path(__file__).parents[3] / "shared" / "data"
GEOMETRY = Geometry(modulator_distance=1.357e-3)


def rocking(j=5, ny=6, nx=8, dtype=np.uint32, geometry=GEOMETRY, seed=0):
    rng = np.random.default_rng(seed)
    mask = np.zeros((ny, nx), bool)
    mask[0, 0] = True
    return RockingScan(
        frames=rng.poisson(3, (j, ny, nx)).astype(dtype),
        angles_deg=np.linspace(-0.25, 0.25, j),
        mask=mask,
        geometry=geometry,
        flux=rng.normal(1, 0.01, j),
        modulator_position=(1.25e-6, -3e-6),
        count_cutoff=1e6,
        metadata={"uid": "abc", "calibration": {"uid": "u", "sha256": "0" * 64}, "sample": "Pt µ"},
    )


def ptychography(j=4, n=8):
    rng = np.random.default_rng(1)
    probe = (rng.normal(size=(2, n, n)) + 1j * rng.normal(size=(2, n, n))).astype(np.complex64)
    return PtychographyScan(
        frames=rng.poisson(3, (j, n, n)).astype(np.float32),
        positions=rng.normal(size=(j, 2)) * 1e-6,
        mask=np.zeros((n, n), bool),
        wavelength=1.3776e-10,
        propagation_distance=5.35 - 1.357e-3,
        pixel_size=75e-6,
        sample_distance=1.357e-3,
        initial_probe=probe,
        flux=rng.normal(1, 0.01, j),
        metadata={"uid": "def"},
    )


def modulator(n=12, modes=2):
    rng = np.random.default_rng(2)
    return Modulator(
        transmission=(rng.normal(size=(n, n + 2)) + 1j).astype(np.complex64),
        pixel_size=38.5e-9,
        sample_distance=1.357e-3,
        sample_distance_error=2e-6,
        centre=(1e-7, -2e-7),
        probe=(rng.normal(size=(modes, n, n)) - 1j).astype(np.complex64),
        trusted=rng.random((n, n + 2)) > 0.5,
        positions=rng.normal(size=(7, 2)),
        positions_start=rng.normal(size=(7, 2)),
        r2=rng.random(4),
        free_llk=rng.random(4),
        metadata={
            "run_uid": "r",
            "created": "2026-01-01",
            "configuration": {"iterations": 60},
            "quality": 0.9,
        },
    )


def reconstruction(shape=(5, 6, 7), trials=3):
    rng = np.random.default_rng(3)
    return Reconstruction(
        image=(rng.normal(size=shape) + 1j * rng.normal(size=shape)).astype(np.complex64),
        support=rng.random(shape) > 0.5,
        voxel_size=(11.5e-9, 9.8e-9, 9.7e-9),
        geometry=replace(GEOMETRY, arm="vertical", arm_sign=-1),
        shear=(0.28, 0.0),
        free_llk=rng.random((trials, 4)),
        error=rng.random((trials, 4)),
        drift=rng.normal(size=(9, 2)) * 1e-9,
        mode_weights=np.array([0.9, 0.1]),
        configuration={"method": "bcmi", "iterations": 200, "schedule": [["er", 10]]},
        metadata={"scan": "abc"},
    )


def assert_same(a, b):
    assert type(a) is type(b)
    for name, value in vars(a).items():
        other = getattr(b, name)
        if isinstance(value, np.ndarray):
            assert value.dtype == other.dtype, name
            np.testing.assert_array_equal(value, other, err_msg=name)
        else:
            assert value == other, name


@pytest.mark.parametrize("content", [rocking(), ptychography(), modulator(), reconstruction()], ids=repr)
def test_what_is_written_is_read(tmp_path, content):
    data.write_cxi(tmp_path / "a.cxi", content)
    assert_same(content, data.read_cxi(tmp_path / "a.cxi"))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(2, 9), st.integers(2, 9)),
    dtype=st.sampled_from([np.uint8, np.uint16, np.uint32, np.float32]),
    energy=st.floats(6000, 20000),
    d1=st.sampled_from([0.0, 1e-3, 0.0123]),
    arm=st.sampled_from(["horizontal", "vertical"]),
    sign=st.sampled_from([1, -1]),
)
def test_any_rocking_scan_survives(tmp_path, shape, dtype, energy, d1, arm, sign):
    geometry = Geometry(energy_ev=round(energy, 3), modulator_distance=d1, arm=arm, arm_sign=sign)
    scan = rocking(*shape, dtype=dtype, geometry=geometry)
    data.write_cxi(tmp_path / "a.cxi", scan)
    assert_same(scan, data.read_rocking(tmp_path / "a.cxi"))


def test_optional_parts_stay_absent(tmp_path):
    scan = replace(rocking(), flux=None, modulator_position=None, count_cutoff=None, metadata={})
    data.write_cxi(tmp_path / "a.cxi", scan)
    assert_same(scan, data.read_rocking(tmp_path / "a.cxi"))


def test_layout_is_what_others_expect(tmp_path):
    scan = rocking()
    data.write_cxi(tmp_path / "a.cxi", scan)
    with h5py.File(tmp_path / "a.cxi") as file:
        detector = file["entry_1/instrument_1/detector_1"]
        np.testing.assert_array_equal(detector["data"], scan.frames)
        assert file["entry_1/data_1/data"].chunks == (1, 6, 8)
        assert hdf5plugin.BSHUF_ID in [
            file["entry_1/data_1/data"].id.get_create_plist().get_filter(i)[0] for i in range(1)
        ]
        assert file["entry_1/instrument_1/source_1/energy"][()] == pytest.approx(9000 * 1.602176634e-19)
        assert detector["distance"][()] == 5.35
        assert detector["mask"].dtype == np.uint32
        assert file["entry_1/sample_1/geometry_1/two_theta"].attrs["units"] == "deg"
        assert file["entry_1/modulator_1/sample_distance"][()] == 1.357e-3


def test_ptychography_distance_is_from_the_crystal(tmp_path):
    data.write_cxi(tmp_path / "a.cxi", ptychography())
    with h5py.File(tmp_path / "a.cxi", "r+") as file:
        assert file["entry_1/instrument_1/detector_1/distance"][()] == pytest.approx(5.35, abs=1e-15)
        del file["entry_1/modulator_1"]
    scan = data.read_ptychography(tmp_path / "a.cxi")
    assert scan.sample_distance == 0
    assert scan.propagation_distance == pytest.approx(5.35, abs=1e-12)


def test_crystal_frame_travels_with_the_result(tmp_path):
    parts = {"displacement": np.arange(8.0).reshape(2, 2, 2), "voxel_size": np.full(3, 1e-8)}
    data.write_cxi(tmp_path / "a.cxi", reconstruction(), crystal=parts)
    back = data.read_crystal(tmp_path / "a.cxi")
    assert back.keys() == parts.keys()
    np.testing.assert_array_equal(back["displacement"], parts["displacement"])


@pytest.mark.parametrize(
    ("dataset", "unit", "factor"),
    [
        ("entry_1/instrument_1/source_1/energy", "eV", 1 / 1.602176634e-19),
        ("entry_1/instrument_1/source_1/energy", b"keV", 1e-3 / 1.602176634e-19),
        ("entry_1/instrument_1/detector_1/x_pixel_size", "um", 1e6),
        ("entry_1/sample_1/geometry_1/rocking_angle", "rad", np.pi / 180),
        ("entry_1/sample_1/geometry_1/two_theta", "mrad", np.pi / 0.18),
        ("entry_1/sample_1/unit_cell_plane_spacing", "Angstrom", 1e10),
    ],
)
def test_units_are_obeyed(tmp_path, dataset, unit, factor):
    scan = rocking()
    data.write_cxi(tmp_path / "a.cxi", scan)
    with h5py.File(tmp_path / "a.cxi", "r+") as file:
        file[dataset][...] = file[dataset][()] * factor
        file[dataset].attrs["units"] = unit
    back = data.read_rocking(tmp_path / "a.cxi")
    assert back.geometry.energy_ev == pytest.approx(9000)
    assert back.geometry.plane_spacing == pytest.approx(scan.geometry.plane_spacing)
    assert back.geometry.pixel_size == pytest.approx(75e-6)
    np.testing.assert_allclose(back.angles_deg, scan.angles_deg, rtol=1e-12)


@pytest.mark.parametrize("n", [7, 8])
def test_frames_in_another_sense_are_turned(tmp_path, n):
    scan = ptychography(n=n)
    data.write_cxi(tmp_path / "a.cxi", scan)
    with h5py.File(tmp_path / "a.cxi", "r+") as file:
        # the first vector along x, the second against y: the data are the transpose, columns mirrored
        name = "entry_1/instrument_1/detector_1/basis_vectors"
        file[name][...] = np.array([[-75e-6, 0, 0], [0, -75e-6, 0]]).T
    back = data.read_ptychography(tmp_path / "a.cxi")
    centre = n // 2
    step = {"row": 1, "column": 2}
    for container, other in ((scan.frames, back.frames), (scan.initial_probe, back.initial_probe)):
        assert (
            other[0, centre + step["row"], centre + step["column"]]
            == container[0, centre - step["column"], centre + step["row"]]
        )


def test_a_file_by_others_is_read():
    path = SHARED / "PETRAIII_P25_Near_Field_Ptycho.cxi"
    if not path.exists():
        pytest.skip(f"{path.name} is not here: real measurements are kept outside the repository")
    scan = data.read_ptychography(path)
    assert scan.frames.shape == (200, 100, 100)
    assert scan.frames.dtype == np.float32
    assert scan.wavelength == pytest.approx(9.794912e-11)
    assert (scan.propagation_distance, scan.sample_distance) == (pytest.approx(1.12), 0)
    assert scan.pixel_size == pytest.approx(55e-6)
    assert scan.mask.sum() == 5
    with h5py.File(path) as file:
        raw = file["entry_1/instrument_1/detector_1/data"][()]
        moved = file["entry_1/sample_1/geometry_1/translation"][()]
    np.testing.assert_allclose(scan.positions, moved[:, :2])
    # its columns run to -x: mirrored about the centre on reading
    np.testing.assert_array_equal(scan.frames[:, 3, 50 + 7], raw[:, 3, 50 - 7])


# -- corruption -------------------------------------------------------------------------------------
FRAMES = "entry_1/data_1/data"
DETECTOR = "entry_1/instrument_1/detector_1"
ANGLE = "entry_1/sample_1/geometry_1/rocking_angle"


def put(name, values, **attrs):
    def change(file):
        if name in file:
            del file[name]
        file[name] = values
        file[name].attrs.update(attrs)

    return change


def put_object_array(file):
    del file[ANGLE]
    file.create_dataset(ANGLE, data=["a"] * 5, dtype=h5py.string_dtype())


def put_absurd_size(file):
    del file[FRAMES]
    file.create_dataset(FRAMES, (10**9, 6, 8), "u4", chunks=(1, 6, 8))


def change_frame(value):
    def change(file):
        frames = file[FRAMES][()].astype(np.float32)
        frames[2, 3, 4] = value
        put(FRAMES, frames)(file)

    return change


def link(name, target):
    def change(file):
        del file[name]
        file[name] = target

    return change


def virtual(file):
    del file[FRAMES]
    layout = h5py.VirtualLayout((5, 6, 8), "u4")
    layout[:] = h5py.VirtualSource("/nowhere/x.h5", "data", (5, 6, 8))
    file.create_virtual_dataset(FRAMES, layout)


def external_raw(file):
    del file[ANGLE]
    file.create_dataset(ANGLE, (5,), "f8", external=[("../secret.bin", 0, 40)])


def unknown_filter(file):
    del file[FRAMES]
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_chunk((1, 6, 8))
    plist.set_filter(32111, h5py.h5z.FLAG_OPTIONAL)
    space = h5py.h5s.create_simple((5, 6, 8))
    frames = h5py.h5d.create(file["entry_1/data_1"].id, b"data", h5py.h5t.NATIVE_UINT32, space, plist)
    frames.write_direct_chunk((0, 0, 0), bytes(100))


@pytest.mark.parametrize(
    ("corrupt", "where", "what"),
    [
        (lambda f: f.__delitem__(FRAMES), FRAMES, "missing"),
        (lambda f: f.__delitem__(f"{DETECTOR}/distance"), "distance", "missing"),
        (lambda f: f.__delitem__("entry_1"), "geometry_1", "neither rocking_angle nor translation"),
        (put(ANGLE, np.zeros(4)), "rocking_angle", "(4,), not (5)"),
        (put(ANGLE, np.array([0, 1, np.nan, 3, 4])), "rocking_angle", "1 of 5 values are not finite"),
        (put(ANGLE, np.zeros(5), units="mm"), "rocking_angle", "units 'mm' is no angle"),
        (put(ANGLE, np.zeros(5), units=3), "rocking_angle", "units '3'"),
        (put_object_array, "rocking_angle", "numbers of the right kind"),
        (put(FRAMES, np.zeros((5, 6), "u4")), FRAMES, "not (frames, rows, columns)"),
        (put(FRAMES, np.zeros((0, 6, 8), "u4")), FRAMES, "not (frames, rows, columns)"),
        (put(FRAMES, np.zeros((5, 6, 8), complex)), FRAMES, "not counts"),
        (put(FRAMES, h5py.Empty("f4")), FRAMES, "empty"),
        (put_absurd_size, FRAMES, "more than this machine's memory"),
        (change_frame(-1), FRAMES, "frame 2 counts -1.0 at row 3, column 4"),
        (change_frame(np.nan), FRAMES, "frame 2 counts nan"),
        (change_frame(np.inf), FRAMES, "frame 2 counts inf"),
        (put(f"{DETECTOR}/mask", np.zeros((6, 7), "u4")), "mask", "(6, 7), not (6, 8)"),
        (put(f"{DETECTOR}/mask", np.ones((6, 8), "u4")), "mask", "every pixel"),
        (put(f"{DETECTOR}/distance", -1.0), "distance", "not between"),
        (put(f"{DETECTOR}/distance", "far"), "distance", "numbers of the right kind"),
        (put(f"{DETECTOR}/distance", [1.0, 2.0]), "distance", "not one number"),
        (put(f"{DETECTOR}/x_pixel_size", 55e-6), "x_pixel_size", "not square"),
        (put(f"{DETECTOR}/arm", "sideways"), "geometry", "arm is 'horizontal' or 'vertical'"),
        (put(f"{DETECTOR}/basis_vectors", np.ones((3, 2))), "basis_vectors", "do not lie along"),
        (put(f"{DETECTOR}/basis_vectors", np.ones(4)), "basis_vectors", "not (3, 2)"),
        (put("entry_1/instrument_1/source_1/energy", 9000.0), "energy", "check it and its units"),
        (put("entry_1/sample_1/geometry_1/two_theta", 60.0), "two_theta", "energy and plane spacing give"),
        (put("entry_1/modulator_1/sample_distance", 6.0), "geometry", "between crystal and detector"),
        (put("entry_1/metadata", "{not json"), "metadata", "is not JSON"),
        (link(FRAMES, h5py.ExternalLink("/etc/passwd", "/x")), FRAMES, "outside the file's folder"),
        (link(FRAMES, h5py.ExternalLink("../other.h5", "/x")), FRAMES, "outside the file's folder"),
        (link(FRAMES, h5py.ExternalLink("other.h5", "/x")), FRAMES, "not there"),
        (link(ANGLE, h5py.SoftLink("rocking_angle")), "rocking_angle", "circle of links"),
        (virtual, FRAMES, "outside the file's folder"),
        (external_raw, "rocking_angle", "outside the file's folder"),
        (unknown_filter, FRAMES, "filter"),
    ],
)
def test_every_corruption_is_one_clear_line(tmp_path, corrupt, where, what):
    path = tmp_path / "a.cxi"
    data.write_cxi(path, rocking())
    with h5py.File(path, "r+") as file:
        corrupt(file)
    with pytest.raises(data.FileError) as caught:
        data.read_cxi(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert ";" in message
    assert where in message
    assert what in message


@pytest.mark.parametrize("keep", [0, 100, 0.5, 0.99])
def test_truncated_and_foreign_files(tmp_path, keep):
    path = tmp_path / "a.cxi"
    data.write_cxi(path, rocking(20, 64, 64))
    content = path.read_bytes()
    path.write_bytes(content[: int(keep if keep >= 1 else keep * len(content))])
    with pytest.raises(data.FileError, match=r"truncated|not HDF5|cannot be opened"):
        data.read_cxi(path)


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(place=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255))
def test_one_wrong_byte_never_gives_a_traceback(tmp_path, place, value):
    path = tmp_path / "a.cxi"
    data.write_cxi(path, rocking())
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] = value
    path.write_bytes(content)
    try:
        data.read_cxi(path)
    except data.FileError as error:
        assert "\n" not in str(error)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(data.FileError, match="does not exist"):
        data.read_cxi(tmp_path / "none.cxi")
    with pytest.raises(data.FileError, match="is a folder"):
        data.read_cxi(tmp_path)
    with pytest.raises(data.FileError, match="folder does not exist"):
        data.write_cxi(tmp_path / "no" / "a.cxi", rocking())
    with pytest.raises(data.FileError, match="cannot be read"):
        data.sha256(tmp_path / "none.cxi")


def test_the_wrong_kind_is_named(tmp_path):
    data.write_cxi(tmp_path / "a.cxi", modulator())
    with pytest.raises(data.FileError, match="is a Modulator, not a rocking scan"):
        data.read_rocking(tmp_path / "a.cxi")


def test_links_within_the_folder_are_followed(tmp_path):
    scan = rocking()
    data.write_cxi(tmp_path / "a.cxi", scan)
    (tmp_path / "raw").mkdir()
    with h5py.File(tmp_path / "raw" / "x.h5", "w") as file:
        file["frames"] = scan.frames
    with h5py.File(tmp_path / "a.cxi", "r+") as file:
        link(FRAMES, h5py.ExternalLink("raw/x.h5", "/frames"))(file)
    np.testing.assert_array_equal(data.read_rocking(tmp_path / "a.cxi").frames, scan.frames)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.cxi"
    data.write_cxi(path, rocking())
    before = data.sha256(path)

    class Broken(np.ndarray):
        def __getitem__(self, key):
            if isinstance(key, slice):
                raise KeyboardInterrupt
            return super().__getitem__(key)

    scan = rocking()
    scan.frames = scan.frames.view(Broken)
    with pytest.raises(KeyboardInterrupt):
        data.write_cxi(path, scan)
    assert data.sha256(path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.cxi"]


def test_masked_pixels_may_hold_anything(tmp_path):
    scan = rocking(dtype=np.float32)
    data.write_cxi(tmp_path / "a.cxi", scan)
    with h5py.File(tmp_path / "a.cxi", "r+") as file:
        file[FRAMES][1, 0, 0] = np.nan
        file[FRAMES][2, 0, 0] = -2
    back = data.read_rocking(tmp_path / "a.cxi")
    assert back.frames[1, 0, 0] == back.frames[2, 0, 0] == 0
