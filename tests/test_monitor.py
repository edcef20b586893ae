"""The live page: what it says of whole, growing and broken-off runs, over real HTTP."""

import json
import threading
import urllib.error
import urllib.request

import pytest

from bcmi_beamline.monitor import Watch, make_server

START = {
    "uid": "abc",
    "time": 10.0,
    "scan_id": 7,
    "plan_name": "rocking_scan",
    "num_points": 2,
    "motors": ["phi"],
}
RUN = [
    ["start", START],
    ["descriptor", {"uid": "b", "name": "baseline", "run_start": "abc"}],
    ["descriptor", {"uid": "p", "name": "primary", "run_start": "abc"}],
    ["event", {"descriptor": "b", "time": 10.5, "data": {"eiger_total": 9}}],
    ["event", {"descriptor": "p", "time": 11.0, "data": {"phi": 17.5, "eiger_total": 100}}],
    ["event", {"descriptor": "p", "time": 12.0, "data": {"phi": 17.6, "eiger_total": 300}}],
    ["stop", {"run_start": "abc", "time": 13.0, "exit_status": "success", "reason": ""}],
]


def lines(documents):
    return "".join(json.dumps(document) + "\n" for document in documents)


def test_a_run_is_followed_while_it_is_written(tmp_path):
    path = tmp_path / "20260101T000000_abc.jsonl"
    watch = Watch(tmp_path)
    assert watch.state()["runs"] == []
    text = lines(RUN)
    cut = text.index('"phi": 17.6')
    path.write_text(text[:cut])  # in the middle of a line
    state = watch.state()
    assert (state["x"], state["counts"], state["x_name"]) == ([17.5], [100.0], "phi")
    assert state["runs"][0]["status"] == "running"
    path.write_text(text)
    run = watch.state()["runs"][0]
    assert (run["points"], run["of"], run["status"], run["seconds"]) == (2, 2, "success", 3.0)
    assert watch.state()["counts"] == [100.0, 300.0]


@pytest.fixture
def served(tmp_path):
    (tmp_path / "documents").mkdir()
    (tmp_path / "documents" / "20260101T000000_abc.jsonl").write_text(lines(RUN))
    server = make_server(tmp_path)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_page_and_state_are_served_on_loopback_and_nothing_else(served):
    with urllib.request.urlopen(served + "/") as answer:
        assert b"bcmi monitor" in answer.read()
    with urllib.request.urlopen(served + "/state.json") as answer:
        assert json.load(answer)["runs"][0]["uid"] == "abc"
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(served + "/../documents")
