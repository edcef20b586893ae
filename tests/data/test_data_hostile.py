"""Files that a dying writer or an ill will left behind: one clear line, at once, in little memory."""

import os
import random
import resource
import subprocess
import sys
import time

import h5py
import hdf5plugin
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_data_cxi import ptychography, rocking
from test_data_exchange import eiger_master, foreign_id01, peak

from bcmi_beamline import data
from bcmi_beamline.data._hdf5 import open_hdf5
from bcmi_beamline.data._unflagged import lookup3

DYING = """
import os, sys
import h5py, hdf5plugin
import numpy as np

file = h5py.File(sys.argv[1], "w", libver="latest")
shape = (0, 16, 16)
data = file.create_dataset(
    "/entry/data/data", shape, "u4", maxshape=(None, 16, 16), chunks=(1, 16, 16),
    **hdf5plugin.Bitshuffle(cname="lz4"),
)
file.swmr_mode = True
for number in range(30):
    data.resize(number + 1, axis=0)
    data[number] = np.random.default_rng(number).poisson(3, (16, 16))
    data.flush()
os._exit(9)
"""


@pytest.fixture(scope="module")
def dead(tmp_path_factory):
    """A data file whose writer was killed."""
    path = tmp_path_factory.mktemp("dead") / "dead.h5"
    subprocess.run([sys.executable, "-c", DYING, str(path)], check=False, timeout=60)
    return path


def test_the_frames_of_a_dead_writer_are_read(dead):
    with pytest.raises(OSError, match="open for write"):
        h5py.File(dead)
    with open_hdf5(dead) as file:
        frames = file["/entry/data/data"][()]
    for number, frame in enumerate(frames):
        np.testing.assert_array_equal(frame, np.random.default_rng(number).poisson(3, (16, 16)))
    assert len(frames) == 30


@pytest.mark.parametrize("share", [0.01, 0.03, 0.05, 0.1, 0.3, 0.6, 0.9, 0.99])
def test_what_a_dead_writer_left_incomplete_is_refused_at_once(dead, tmp_path, share):
    """HDF5 itself waits on some of these for ever."""
    content = dead.read_bytes()
    (tmp_path / "cut.h5").write_bytes(content[: int(share * len(content))])
    started = time.monotonic()
    try:
        with open_hdf5(tmp_path / "cut.h5") as file:
            file["/entry/data/data"][()]
    except (OSError, KeyError):
        pass
    assert time.monotonic() - started < 20  # not for ever


def test_the_checksum_is_the_one_that_hdf5_writes(tmp_path):
    for name in ("a", "b"):
        with h5py.File(tmp_path / name, "w", libver="latest") as file:
            file[name * 50] = np.arange(100)
        head = (tmp_path / name).read_bytes()[:48]
        assert lookup3(head[:44]) == int.from_bytes(head[44:], "little")


def bomb(path, storage):
    """A rocking file that declares 4 GB of zeros."""
    data.write_cxi(path, rocking())
    with h5py.File(path, "r+") as file:
        del file["entry_1/data_1/data"]
        shape = (4096, 512, 512)
        file.create_dataset("entry_1/data_1/data", shape, "u4", chunks=(1, 512, 512), **storage)
        file["entry_1/data_1/data"][:8] = 0


@pytest.mark.parametrize("storage", [{"compression": "gzip"}, dict(hdf5plugin.Bitshuffle(cname="lz4")), {}])
def test_a_decompression_bomb_is_refused(tmp_path, storage):
    bomb(tmp_path / "a.cxi", storage)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(data.FileError, match=r"declares 4\.29 GB but stores"):
        data.load(tmp_path / "a.cxi")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # kB


def specimens(folder):
    frames = peak((9, 40, 36), (4, 20, 18)).astype(np.uint32)
    data.write_cxi(folder / "rocking.cxi", rocking())
    data.write_cxi(folder / "ptychography.cxi", ptychography())
    data.write_id01(folder / "ours.h5", rocking(9, 32, 30))
    foreign_id01(folder / "id01.h5", frames, np.linspace(0, 1, 9), row=20, column=18)
    return [*folder.glob("*.cxi"), *folder.glob("*.h5"), eiger_master(folder, frames)]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return specimens(tmp_path_factory.mktemp("specimens"))


@settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    seed=st.integers(0, 2**32 - 1), which=st.integers(0, 4), damage=st.sampled_from(["bytes", "cut", "block"])
)
def test_damage_never_gives_a_traceback(written, seed, which, damage):
    chance, source = random.Random(seed), written[which]
    content = bytearray(source.read_bytes())
    if damage == "cut":
        del content[chance.randrange(len(content)) :]
    elif damage == "block":
        start, length = chance.randrange(len(content)), chance.randrange(1, 600)
        content[start : start + length] = chance.randbytes(length)
    else:
        for _ in range(chance.randrange(1, 40)):
            content[chance.randrange(len(content))] = chance.randrange(256)
    path = source.with_name("damaged.h5")
    path.write_bytes(content)
    try:
        data.load(path)
    except data.FileError as error:
        assert "\n" not in str(error)
    finally:
        os.unlink(path)


@pytest.mark.parametrize("layout", ["external", "virtual"])
def test_an_eiger_master_reads_nothing_outside_its_folder(tmp_path, layout):
    (tmp_path / "in").mkdir()
    master = eiger_master(tmp_path / "in", peak((9, 40, 36), (4, 20, 18)).astype(np.uint32), layout)
    for path in (tmp_path / "in").glob("*_data_*"):
        path.rename(tmp_path / path.name)
        path.symlink_to(tmp_path / path.name)
    with pytest.raises(data.FileError, match="outside the file's folder"):
        data.load(master)
