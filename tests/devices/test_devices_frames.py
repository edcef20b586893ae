"""Statistics of a frame, and reading one from a file that still grows."""

import h5py
import hdf5plugin
import numpy as np
import pytest

from bcmi_beamline.devices import _frames
from bcmi_beamline.devices._frames import FrameReader, FrameStatistics, Window

INVALID = 2**32 - 1


def statistics(size=256, cutoff=10_000, good=None):
    good = np.ones((size, size), bool) if good is None else good
    return FrameStatistics(good, cutoff, INVALID)


def frame(size=256, **counts):
    made = np.zeros((size, size), np.uint32)
    for where, n in counts.items():
        row, column = (int(v) for v in where[1:].split("_"))
        made[row, column] = n
    return made


def test_shares_far_from_the_beam_in_each_direction():
    # beam at (128, 128); the edge is at 0.23 * 256 = 58.9 px: beyond along x, y, both; within
    counts = frame(p128_187=10, p69_128=20, p228_228=30, p128_186=40)
    told = statistics()(counts)
    assert told["total"] == 100
    assert told["max"] == 40
    assert told["high_q_x"] == pytest.approx(0.10)
    assert told["high_q_y"] == pytest.approx(0.20)
    assert told["saturated"] == 0


def test_sixty_pixels_hold_for_large_windows_and_shrink_in_small_ones():
    small, large = statistics(64), statistics(432)
    inside = frame(64, p32_46=1)  # 14 px
    outside = frame(64, p32_47=1)  # 15 px: 0.23 * 64 = 14.7
    assert small(inside)["high_q_x"] == 0 and small(outside)["high_q_x"] == 1
    assert large(frame(432, p216_276=1))["high_q_x"] == 0
    assert large(frame(432, p216_277=1))["high_q_x"] == 1


def test_gaps_and_saturated_pixels_do_not_count():
    good = np.ones((256, 256), bool)
    good[100] = False
    counts = frame(p100_200=INVALID, p101_200=INVALID, p128_128=10_000, p128_129=20_000, p128_130=9_999)
    counts[100, 3] = 77
    told = statistics(good=good)(counts)
    assert told == {"total": 9_999, "max": 9_999, "high_q_x": 0.0, "high_q_y": 0.0, "saturated": 2}


def test_an_empty_frame_has_no_share_anywhere():
    assert statistics()(frame())["high_q_x"] == 0.0


def test_sums_beyond_32_bits():
    counts = np.full((64, 64), 3_000_000, np.uint32)
    assert statistics(64, cutoff=2**31)(counts)["total"] == 64 * 64 * 3_000_000


def test_window_is_centred_and_stays_on_the_detector():
    rows, columns = Window(4, row=10, column=20).check(2164, 1030).slices
    assert (rows.start, rows.stop, columns.start, columns.stop) == (8, 12, 18, 22)
    with pytest.raises(ValueError, match=r"needs columns 428 to 1451 of a detector with 1030"):
        Window(1024, row=1300, column=940).check(2164, 1030)


@pytest.fixture
def growing_file(tmp_path):
    path = tmp_path / "series_1_data_000001.h5"
    with h5py.File(path, "w", libver="latest") as file:
        data = file.create_dataset(
            _frames.DATASET,
            shape=(0, 8, 8),
            maxshape=(None, 8, 8),
            chunks=(1, 8, 8),
            dtype="u4",
            **hdf5plugin.Bitshuffle(cname="lz4"),
        )
        file.swmr_mode = True

        def write(value):
            data.resize(data.shape[0] + 1, axis=0)
            data[-1] = value
            data.flush()

        yield path, write


def test_frames_are_read_while_the_file_grows(growing_file):
    path, write = growing_file
    reader = FrameReader()
    for row in range(3):
        write(row + 1)
        assert np.all(reader.read(path, row, Window(4, 4, 4)) == row + 1)
    reader.close()


def test_a_frame_that_does_not_come_says_where_it_was_looked_for(growing_file, monkeypatch, tmp_path):
    monkeypatch.setattr(_frames, "VISIBLE_WITHIN_S", 0.1)
    path, write = growing_file
    write(1)
    reader = FrameReader()
    with pytest.raises(OSError, match="holds 1 frames") as caught:
        reader.read(path, 1, Window(4, 4, 4))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(OSError, match="does not exist: FilePath must be a folder"):
        reader.read(tmp_path / "elsewhere.h5", 0, Window(4, 4, 4))


def test_the_edge_may_be_asked_for():
    far = FrameStatistics(np.ones((256, 256), bool), 10_000, 2**32 - 1, high_q_px=100.0)
    assert far(frame(p128_228=1))["high_q_x"] == 0
    assert far(frame(p128_229=1))["high_q_x"] == 1
