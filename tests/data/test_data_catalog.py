"""The embedded catalogue with a real server, and a writer that a scan never notices."""

import threading
import time

import numpy as np
import pytest
from fake_beamline import FakeEiger, poisson, take

from bcmi_beamline import data


def scan(folder, *callbacks, points=10, images_per_file=4, **options):
    eiger = FakeEiger(folder, poisson((points, 9, 7)), images_per_file=images_per_file)
    return eiger, take(eiger, {"phi": np.arange(points) * 0.1}, callbacks, **options)


def test_a_run_over_several_files_reads_back_in_order(catalog, tmp_path):
    eiger, uid = scan(tmp_path, catalog.writer, points=10, sample="Pt")
    catalog.flush()
    assert catalog.writer.failures == {}
    run = catalog[-1]
    assert run.metadata["start"]["uid"] == uid
    assert run.metadata["stop"]["exit_status"] == "success"
    image = run["primary"]["eiger_image"]
    assert image.shape == (10, 9, 7)
    np.testing.assert_array_equal(image[:], eiger.frames)
    np.testing.assert_array_equal(image[3:9, 2:5, 1:], eiger.frames[3:9, 2:5, 1:])
    np.testing.assert_allclose(run["primary"].read(["phi"])["phi"], np.arange(10) * 0.1)
    names = [name for name, _ in run.documents()]
    assert (names[0], names[-1], names.count("event")) == ("start", "stop", 10)
    assert catalog.run(uid[:8]).metadata["start"]["sample"] == "Pt"


def test_an_unknown_run_is_one_clear_line(catalog):
    with pytest.raises(data.CatalogError, match="run '0123456789' is not in the catalogue") as caught:
        catalog.run("0123456789")
    assert "\n" not in str(caught.value)


def test_a_writer_that_fails_never_stops_the_scan(tmp_path):
    def refuse():
        raise ConnectionError("the server\nis gone")

    writer = data.BackgroundTiledWriter(refuse)
    seen = []
    _, uid = scan(tmp_path, writer, lambda name, doc: seen.append(name))
    writer.flush()
    assert seen.count("event") == 10
    assert writer.failures == {uid: "start: the server is gone"}
    writer.close()


def test_a_writer_that_hangs_never_delays_the_scan(tmp_path):
    release = threading.Event()

    def hang():
        release.wait(60)
        raise ConnectionError("too late")

    writer = data.BackgroundTiledWriter(hang)
    started = time.monotonic()
    for _ in range(1000):
        writer("start", {"uid": str(time.monotonic_ns()), "time": 0.0})
    assert time.monotonic() - started < 5
    with pytest.raises(data.CatalogError, match=r"not stored everything within 0\.1 s"):
        writer.flush(0.1)
    release.set()
    writer.flush()
    assert len(writer.failures) == 1000
    writer.close()


def test_a_document_that_cannot_be_copied_is_dropped(caplog):
    writer = data.BackgroundTiledWriter(lambda: None)
    writer("start", {"uid": "a", "lock": threading.Lock()})
    writer.flush()
    assert "a start document was not queued" in caplog.text
    assert not writer.failures
    writer.close()


def test_one_failed_run_leaves_the_next_alone(catalog, tmp_path):
    log = data.DocumentLog(tmp_path / "log")
    clients = iter([None, catalog.client])
    writer = data.BackgroundTiledWriter(lambda: next(clients))
    eiger, lost = scan(tmp_path, log, writer)
    _, kept = scan(tmp_path, log, writer)
    writer.flush()
    assert list(writer.failures) == [lost]
    assert catalog[-1].metadata["start"]["uid"] == kept

    # what was lost comes back from the log, once
    assert catalog.restore(log.path(lost)) is True
    assert catalog.restore(log.path(lost)) is False
    np.testing.assert_array_equal(catalog.run(lost)["primary"]["eiger_image"][:], eiger.frames)
    writer.close()


def test_a_run_stored_in_part_is_restored_whole(catalog, tmp_path):
    from bluesky_tiled_plugins import TiledWriter

    log = data.DocumentLog(tmp_path / "log")
    eiger, uid = scan(tmp_path, log)
    partial = TiledWriter(catalog.client, batch_size=1)
    for name, doc in list(data.read_log(log.path(uid)))[:12]:
        partial(name, doc)
    assert not catalog.run(uid).metadata.get("stop")
    assert catalog.restore(log.path(uid)) is True
    run = catalog.run(uid)
    assert len(run["primary"].read(["phi"])["phi"]) == 10
    np.testing.assert_array_equal(run["primary"]["eiger_image"][:], eiger.frames)


def test_a_log_without_a_run_is_one_clear_line(catalog, tmp_path):
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(data.FileError, match="holds no run"):
        catalog.restore(tmp_path / "a.jsonl")


def test_an_aborted_scan_is_stored(catalog, tmp_path):
    scan(tmp_path, catalog.writer, fail_at=6)
    catalog.flush()
    run = catalog[-1]
    assert run.metadata["stop"]["exit_status"] == "fail"
    assert run["primary"]["eiger_image"].shape[0] == 6


def test_only_this_process_may_ask(catalog):
    import httpx

    assert catalog.uri.startswith("http://127.0.0.1:")
    assert httpx.get(f"{catalog.uri}/api/v1/metadata/").status_code == 401


def test_a_second_process_may_open_the_same_folder(catalog, catalog_folder, tmp_path):
    _, uid = scan(tmp_path, catalog.writer)
    catalog.flush()
    started = time.monotonic()
    with data.open_catalog(catalog_folder, readable=[tmp_path]) as second:
        assert time.monotonic() - started < 2  # its server starts in the background
        assert second.run(uid)["primary"]["eiger_image"].shape == (10, 9, 7)
        _, later = scan(tmp_path, second.writer)
        second.flush()
        server = second._server._process
    assert server.poll() is not None
    assert catalog[-1].metadata["start"]["uid"] == later


def test_a_server_that_cannot_start_says_why(tmp_path):
    (tmp_path / "catalog.db").write_text("no database " * 1000)
    with data.open_catalog(tmp_path) as catalog, pytest.raises(data.CatalogError, match="did not start") as e:
        catalog.client
    assert "\n" not in str(e.value)


def test_no_server_elsewhere_is_one_clear_line():
    with (
        data.open_catalog(uri="http://127.0.0.1:1") as catalog,
        pytest.raises(data.CatalogError, match="no catalogue answers"),
    ):
        catalog.client


def test_a_server_elsewhere(catalog, monkeypatch):
    monkeypatch.setenv("TILED_API_KEY", catalog._api_key)
    with data.open_catalog(uri=catalog.uri) as other:
        assert len(other) == len(catalog)
