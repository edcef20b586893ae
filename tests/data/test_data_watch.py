"""A run that grows: each frame is read once, and what it ends with is what `load` gives."""

import copy
import itertools
from collections import Counter

import numpy as np
import pytest
from fake_beamline import INVALID, FakeEiger, poisson, take
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data_load import CUTOFF, PTYCHOGRAPHY, ROCKING, SHAPE, rocking_values

from bcmi_beamline import data
from bcmi_beamline.data import _load
from bcmi_beamline.data._clean import KeptFrames, clean_frames


def assert_same(found, wanted):
    """Bit for bit, whatever a scan holds."""
    assert type(found) is type(wanted)
    for name, value in vars(wanted).items():
        other = getattr(found, name)
        if isinstance(value, np.ndarray):
            assert other.dtype == value.dtype, name
            np.testing.assert_array_equal(other, value, err_msg=name)
        else:
            assert other == value, name


@pytest.fixture
def reads(monkeypatch):
    """How often each frame was read: by file and row, or by row of the server's array."""
    counted = Counter()
    for source in (_load._LocalFrames, _load._ServedFrames):

        def read(self, wanted, cut, real=source.read):
            where = str(self._files[0]) if isinstance(self, _load._LocalFrames) else "server"
            counted.update((where, int(row)) for row in wanted)
            return real(self, wanted, cut)

        monkeypatch.setattr(source, "read", read)
    return counted


def damaged(frames, seed=0):
    """With a hot pixel, a dead one, lost counts and saturation that come and go: the mask changes."""
    frames = frames.copy()
    frames[:, 12, 10] = 700
    frames[:, 11:14, 5:8] = 150
    frames[3:, 12, 6] = 0
    frames[:2, 13, 9] = INVALID
    frames[len(frames) // 2, 9, 9] = CUTOFF
    return frames


def test_a_rocking_run_in_two_with_sentinels_is_watched_as_it_grows(catalog, tmp_path, reads):
    log = data.DocumentLog(tmp_path / "documents")
    frames = damaged(poisson((23, *SHAPE), seed=8))
    marks = np.zeros(23)
    marks[[0, 5, 9, 10, 16]] = 1
    values = {**rocking_values(23), "sentinel": marks}
    seen, before, uids, watched = [], [], [], [iter([])]

    def look(name, doc):
        if name == "start":
            watched[:] = [data.watch(doc["uid"], log=log, log_wait_s=0)]
            uids.append(doc["uid"])
        elif (name == "event" and not doc["data"].get("sentinel", 1)) or name == "stop":
            scan = next(watched[0])
            seen.append(scan)
            before.append(copy.deepcopy(scan))
        if name == "stop":
            assert list(watched[0]) == []

    for cut in (slice(0, 10), slice(10, 23)):
        (folder := tmp_path / str(cut.start)).mkdir()
        eiger = FakeEiger(folder, frames[cut], images_per_file=5)
        more = {"continues": uids[-1]} if uids else {}
        part = {key: value[cut] for key, value in values.items()}
        take(eiger, part, [log, catalog.writer, look], **ROCKING, **more)
        if not more:
            assert max(reads.values()) == 1
            reads.clear()
    sizes = [len(scan.frames) for scan in seen]
    assert sizes == [*range(1, 8), 7, *range(8, 19), 18]
    assert len(reads) == 23 and max(reads.values()) == 1
    assert len({scan.mask.tobytes() for scan in seen}) > 2
    for scan, was in zip(seen, before, strict=True):
        assert_same(scan, was)  # what was handed out is left alone
    catalog.flush()
    reads.clear()
    assert_same(seen[7], data.load(uids[0], catalog))
    assert_same(seen[-1], data.load(uids[1], catalog))
    assert seen[-1].sentinel_after.tolist() == [0, 3, 6, 6, 11]


@pytest.mark.parametrize("served", [False, True])
def test_a_ptychography_run_is_watched_in_the_catalogue(catalog, tmp_path, reads, monkeypatch, served):
    if served:
        monkeypatch.setattr(_load, "local_files", lambda image: ([], ""))
    writer = data.BackgroundTiledWriter(lambda: catalog.client, batch_size=1)
    frames = damaged(poisson((9, *SHAPE), seed=9))
    values = {"nanogoniometer_x": np.arange(9.0), "nanogoniometer_y": np.arange(9.0) ** 2}
    seen, watched = [], [iter([])]

    def look(name, doc):
        writer(name, doc)
        writer.flush()
        if name == "start":
            watched[:] = [data.watch(doc["uid"], lambda: catalog, catalog_wait_s=0)]
        elif name == "event" and doc["seq_num"] in (1, 2, 7):
            seen.append(next(watched[0]))
        elif name == "stop":
            seen.extend(watched[0])

    uid = take(FakeEiger(tmp_path, frames), values, [look], **PTYCHOGRAPHY)
    assert [len(scan.frames) for scan in seen] == [1, 2, 7, 9]
    assert len(reads) == 9 and max(reads.values()) == 1
    assert_same(seen[-1], data.load(uid, catalog))


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """A log with one good rocking run of six points; its uid."""
    folder = tmp_path_factory.mktemp("logged")
    log = data.DocumentLog(folder / "documents")
    eiger = FakeEiger(folder, poisson((6, *SHAPE)))
    return log, take(eiger, rocking_values(6), [log], **ROCKING)


def test_a_run_that_is_over_is_one_scan(logged):
    log, uid = logged
    (scan,) = data.watch(uid[:8], log=log)
    assert len(scan.frames) == 6 and scan.metadata["exit_status"] == "success"


def test_a_run_whose_session_died_is_over(logged, tmp_path):
    log, uid = logged
    *lines, stop = log.path(uid).read_bytes().splitlines(keepends=True)
    (tmp_path / log.path(uid).name).write_bytes(b"".join(lines) + stop[:20])
    (scan,) = data.watch(uid, log=data.DocumentLog(tmp_path))
    assert len(scan.frames) == 6 and scan.metadata["exit_status"] == "unknown"


def test_a_frame_that_is_not_seen_yet_is_waited_for(tmp_path, monkeypatch):
    """The event is there before this machine sees the frame, as on a network file system."""
    log = data.DocumentLog(tmp_path / "documents")
    tries, real = iter([True, True, False]), _load._LocalFrames.read
    seen = []

    def read(self, wanted, cut):
        if next(tries, False):
            raise data.FileError("not there yet")
        return real(self, wanted, cut)

    def look(name, doc):
        if name == "event" and doc["seq_num"] == 1:
            seen.append(next(data.watch(doc_uid(log), log=log, log_wait_s=0)))

    monkeypatch.setattr(_load._LocalFrames, "read", read)
    take(FakeEiger(tmp_path, poisson((2, *SHAPE))), rocking_values(2), [log, look], **ROCKING)
    assert len(seen[0].frames) == 1 and not next(tries, False)


def doc_uid(log):
    return log.paths()[-1].stem.split("_", 1)[1]


def test_frames_elsewhere_come_through_the_catalogue(catalog, tmp_path, logged):
    log, uid = logged
    text = log.path(uid).read_text()
    path = tmp_path / log.path(uid).name
    path.write_text(text.replace("file://localhost", "file://localhost/not/mounted/here"))
    with pytest.raises(ValueError, match="not on this machine; give the catalogue"):
        next(data.watch(uid, log=data.DocumentLog(tmp_path)))
    catalog.restore(log.path(uid))
    (scan,) = data.watch(uid, lambda: catalog, data.DocumentLog(tmp_path))
    assert_same(scan, data.load(uid, catalog))


def test_a_resumed_run_needs_the_log_of_the_first(logged, tmp_path):
    _, uid = logged
    other = data.DocumentLog(tmp_path)
    start = {**ROCKING, "continues": uid}
    second = take(FakeEiger(tmp_path, poisson((2, *SHAPE))), rocking_values(2), [other], **start)
    with pytest.raises(ValueError, match="give the catalogue"):
        next(data.watch(second, log=other))


def test_what_cannot_be_watched_is_one_clear_line(catalog, logged, tmp_path):
    log, uid = logged
    with pytest.raises(data.FileError, match="0 logged runs start with 'nothing'"):
        next(data.watch("nothing", log=log))
    with pytest.raises(data.CatalogError, match="run 'nothing' is not in the catalogue"):
        next(data.watch("nothing", lambda: catalog, log))
    (tmp_path / log.path(uid).name).write_bytes(log.path(uid).read_bytes() + b"[1]\n")
    with pytest.raises(data.FileError, match=r"byte \d+: is no document"):
        next(data.watch(uid, log=data.DocumentLog(tmp_path)))
    empty = take(FakeEiger(tmp_path, poisson((1, *SHAPE))), {"x": []}, [log], **ROCKING)
    with pytest.raises(data.FileError, match="has no points; take the scan again"):
        next(data.watch(empty, log=log))


def test_frames_that_are_kept_are_not_moved_to_a_larger_place():
    frames, bad = poisson((200, *SHAPE)), np.zeros(SHAPE, bool)
    kept = KeptFrames(None, True)
    found = [kept.grow(frames[:n], bad)[0] for n in (60, 120, 200)]
    assert np.shares_memory(found[0], found[1]) and np.shares_memory(found[0], found[2])


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    steps=st.lists(st.integers(0, 6), min_size=1, max_size=6),
    cutoff=st.sampled_from([None, 40.0]),
    per_frame=st.booleans(),
)
def test_kept_frames_are_the_clean_ones_at_every_size(seed, steps, cutoff, per_frame):
    rng = np.random.default_rng(seed)
    frames = rng.poisson(rng.choice([0.1, 5, 300], (40, 1, 1)), (40, 6, 7)).astype(np.uint16)
    frames[rng.random(frames.shape) < 0.05] = 2**16 - 1
    frames[:, 3, 3] *= rng.integers(0, 2, 40).astype(np.uint16) * 40
    bad = rng.random((6, 7)) < 0.1
    kept, given_out = KeptFrames(cutoff, per_frame), []
    for size in itertools.accumulate(steps, initial=1):
        found, mask = kept.grow(frames[:size], bad)
        clean, wanted = clean_frames(frames[:size], bad, cutoff, per_frame=per_frame)
        np.testing.assert_array_equal(mask, wanted)
        np.testing.assert_array_equal(found, clean[:])
        given_out.append((found, clean[:]))
    for found, then in given_out:
        np.testing.assert_array_equal(found, then)
