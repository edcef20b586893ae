"""The document log: complete, exact, replayed once, and never in the way of a scan."""

import json

import event_model
import numpy as np
import pytest
from fake_beamline import FakeEiger, poisson, take

from bcmi_beamline import data


def one_run(tmp_path, *more, **options):
    """Documents as a subscriber saw them, the log, and the uid."""
    seen, log = [], data.DocumentLog(tmp_path / "log")
    eiger = FakeEiger(tmp_path, poisson((6, 8, 8)), images_per_file=4)
    values = {"phi": np.linspace(-1, 1, 5)}
    uid = take(eiger, values, [lambda *d: seen.append(d), log, *more], **options)
    return seen, log, uid


def test_log_holds_every_document_exactly(tmp_path):
    seen, log, uid = one_run(tmp_path, energy=np.float32(1.5), window=np.arange(3), path=tmp_path)
    assert [name for name, _ in seen].count("stream_resource") == 2
    back = list(data.read_log(log.path(uid)))
    assert [name for name, _ in back] == [name for name, _ in seen]
    assert back[0][1]["energy"] == 1.5
    assert back[0][1]["window"] == [0, 1, 2]
    for (_, ours), (name, theirs) in zip(back, seen, strict=True):
        if name != "start":
            assert ours == json.loads(json.dumps(theirs))


def test_documents_follow_the_event_model(tmp_path):
    _, log, uid = one_run(tmp_path)
    documents = list(data.read_log(log.path(uid)))
    assert (documents[0][0], documents[-1][0]) == ("start", "stop")
    for name, doc in documents:
        event_model.schema_validators[event_model.DocumentNames[name]].validate(doc)


def test_replay_gives_the_same_documents_once(tmp_path):
    _, log, uid = one_run(tmp_path)
    again = []
    assert data.replay(log.path(uid), lambda *d: again.append(d)) == uid
    assert again == list(data.read_log(log.path(uid)))


def test_each_run_has_its_file(tmp_path):
    log = data.DocumentLog(tmp_path)
    for uid, stamp in (("aaaa1", 1.0), ("aaab2", 2.0)):
        log("start", {"uid": uid, "time": stamp})
    for uid in ("aaaa1", "aaab2"):  # interleaved runs
        log("stop", {"uid": uid[::-1], "run_start": uid, "time": 3.0, "exit_status": "success"})
    assert [len(list(data.read_log(path))) for path in log.paths()] == [2, 2]
    assert log.path("aaab").name == "19700101T000002_aaab2.jsonl"
    with pytest.raises(data.FileError, match="2 logged runs start with 'aaa'"):
        log.path("aaa")


@pytest.mark.parametrize("cut", [1, 20])
def test_a_run_cut_off_by_a_crash_is_ended(tmp_path, cut):
    _, log, uid = one_run(tmp_path)
    path = log.path(uid)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1])[:-cut])  # no stop, the last event half written
    events = sum('["event"' in line for line in lines) - 1
    again = []
    data.replay(path, lambda *d: again.append(d))
    name, stop = again[-1]
    assert name == "stop"
    assert (stop["exit_status"], stop["run_start"]) == ("abort", uid)
    assert stop["num_events"] == {"primary": events}
    event_model.schema_validators[event_model.DocumentNames.stop].validate(stop)


def test_a_full_disk_does_not_stop_the_scan(tmp_path):
    (tmp_path / "log").write_text("a file where the folder should be")
    _, log, uid = one_run(tmp_path)
    assert list(log.failures) == [uid]


def test_foreign_files_are_one_clear_line(tmp_path):
    path = tmp_path / "a.jsonl"
    with pytest.raises(data.FileError, match=r"a\.jsonl: file: cannot be read"):
        data.replay(path, print)
    path.write_text('["start", {"uid": "a", "time": 1}]\nnot json\n')
    with pytest.raises(data.FileError, match="line 2: is not"):
        data.replay(path, lambda *_: None)
    path.write_text("")
    with pytest.raises(data.FileError, match="holds no run"):
        data.replay(path, print)
