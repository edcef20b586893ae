"""``bcmi serve`` and ``bcmi replay``, as one types them; the catalogue as others ask it."""

import os
import signal
import subprocess
import sys
import time

import httpx
import numpy as np
import pytest
from fake_beamline import FakeEiger, poisson, take

from bcmi_beamline import data

USERS = """
authentication:
  providers:
  - provider: hutch
    authenticator: tiled.authenticators:DictionaryAuthenticator
    args: {users_to_passwords: {ada: engine, grace: hopper}}
"""


def bcmi(*arguments, **options):
    command = [sys.executable, "-m", "bcmi_beamline.cli", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def address(server):
    """Where a served catalogue says it is, once it answers; and the second line it says."""
    first, second = server.stdout.readline(), server.stdout.readline()
    url = first.partition(": ")[2].split()[0]
    for _ in range(600):
        try:
            httpx.get(f"{url}/healthz", timeout=1)
            return url, second.strip()
        except httpx.HTTPError:
            time.sleep(0.1)
    raise TimeoutError(first)


def logged_run(folder, points=5):
    """A session's folder with one run in its document log and none in its catalogue."""
    log = data.DocumentLog(folder / "documents")
    eiger = FakeEiger(folder, poisson((points, 9, 7)))
    return eiger, take(eiger, {"phi": np.arange(points) * 0.1}, [log], sample="Pt")


def test_replay_and_a_service_with_one_user(tmp_path, monkeypatch):
    eiger, uid = logged_run(tmp_path)
    server = bcmi("serve", "--directory", tmp_path, "--port", 0, "--readable", tmp_path)
    try:
        url, key = address(server)
        assert key.startswith("TILED_API_KEY=")
        assert httpx.get(f"{url}/api/v1/metadata/").status_code == 401
        environment = os.environ | {"BCMI_CATALOG": url, "TILED_API_KEY": key.partition("=")[2]}
        for said in (f"{uid}: stored\n1 stored\n", f"{uid}: was there\n0 stored\n"):
            out, _ = bcmi("replay", "--directory", tmp_path, env=environment).communicate(timeout=120)
            assert out == said
        monkeypatch.setenv("TILED_API_KEY", environment["TILED_API_KEY"])
        with data.open_catalog(uri=url) as catalog:
            run = catalog[-1]
            np.testing.assert_array_equal(run["primary"]["eiger_image"][:], eiger.frames)
    finally:
        server.send_signal(signal.SIGINT)
        _, err = server.communicate(timeout=30)
    assert server.returncode == 0
    assert "Traceback" not in err


def test_a_service_with_many_users(tmp_path):
    (tmp_path / "users.yml").write_text(USERS)
    server = bcmi("serve", "--directory", tmp_path, "--port", 0, "--users", tmp_path / "users.yml")
    try:
        url, said = address(server)
        assert "users.yml" in said
        token = f"{url}/api/v1/auth/provider/hutch/token"
        refused = httpx.post(token, data={"username": "ada", "password": "wrong"})
        assert refused.status_code == 401
        answer = httpx.post(token, data={"username": "ada", "password": "engine"}).json()
        headers = {"Authorization": f"Bearer {answer['access_token']}"}
        assert httpx.get(f"{url}/api/v1/metadata/").status_code == 401
        assert httpx.get(f"{url}/api/v1/metadata/", headers=headers).status_code == 200
        assert (tmp_path / "catalog" / "secret_key").stat().st_mode & 0o77 == 0
    finally:
        server.send_signal(signal.SIGINT)
        server.communicate(timeout=30)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (None, "users.yml: file: cannot be read"),
        ("a: [", "users.yml: file: cannot be read"),
        ("authentication: {}", "authentication.providers: is missing"),
        (USERS + "trees: []", "users.yml: trees: is set by bcmi"),
    ],
)
def test_a_users_file_that_cannot_be_used_is_one_clear_line(tmp_path, text, what):
    from bcmi_beamline.data._commands import serve_catalog

    if text is not None:
        (tmp_path / "users.yml").write_text(text)
    with pytest.raises(data.FileError) as caught:
        serve_catalog(tmp_path, print, port=0, users=tmp_path / "users.yml")
    assert what in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_port_in_use_and_a_catalogue_elsewhere_are_one_clear_line(tmp_path, monkeypatch):
    import socket

    from bcmi_beamline.data._commands import serve_catalog

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match="in use; choose another --host or --port"):
            serve_catalog(tmp_path, print, port=port)
    monkeypatch.setenv("BCMI_CATALOG", "http://elsewhere")
    with pytest.raises(ValueError, match="BCMI_CATALOG is http://elsewhere, served elsewhere"):
        serve_catalog(tmp_path, print)


def test_replay_without_a_log_is_one_clear_line(tmp_path):
    from bcmi_beamline.data._commands import replay_runs

    with pytest.raises(data.FileError, match="holds no document log; name the session's folder"):
        replay_runs(tmp_path, [], print)
    with pytest.raises(data.FileError, match="0 logged runs start with 'abc'"):
        replay_runs(tmp_path, ["abc"], print)


def test_runs_are_found_by_sample_plan_number_and_time(catalog, tmp_path):
    uids = {}
    for number, (sample, plan) in enumerate([("Pt", "rock"), ("Au", "rock"), ("Pt", "spiral")], 901):
        eiger = FakeEiger(tmp_path, poisson((2, 9, 7)))
        start = {"sample": sample, "plan_name": plan, "scan_id": number}
        uids[number] = take(eiger, {"phi": np.zeros(2)}, [catalog.writer], **start)
    catalog.flush()
    began = catalog[-1].metadata["start"]["time"]

    def found(**query):
        return {run.metadata["start"]["scan_id"] for run in catalog.search(**query).values()}

    assert found(sample="Au") == {902}
    assert {901, 902} <= found(plan="rock")
    assert found(sample="Pt", plan="spiral") == {903}
    assert found(scan_id=902) == {902}
    assert 903 in found(since=began - 1)
    assert not found(until=began - 86400)
    assert catalog.search(sample="Pt")[-1].metadata["start"]["uid"] == uids[903]
    assert not found(sample="Cu")


def test_databroker_reads_tables_and_images(catalog, tmp_path):
    eiger = FakeEiger(tmp_path, poisson((6, 9, 7)), images_per_file=4)
    uid = take(eiger, {"phi": np.arange(6) * 0.1}, [catalog.writer], sample="Pt", plan_name="broker")
    catalog.flush()
    header = catalog.broker[-1]
    assert header.start["uid"] == uid
    np.testing.assert_allclose(header.table()["phi"], np.arange(6) * 0.1)
    np.testing.assert_array_equal(list(header.data("eiger_image")), eiger.frames)
    assert [name for name, _ in header.documents()][-1] == "stop"
    assert [found.start["uid"] for found in catalog.broker(plan_name="broker")] == [uid]
    assert catalog[-1]["primary"]["eiger_image"].shape[0] > 0, "Broker leaves the other clients as they were"


def test_a_running_scan_is_read_in_order_one_chunk_a_frame(catalog, tmp_path):
    eiger, seen = FakeEiger(tmp_path, poisson((72, 9, 7)), images_per_file=40), []

    def look(name, doc):
        if name == "event" and doc["seq_num"] == 70:  # 25 of the first file are told of, 25 of the second
            catalog.flush()
            image = catalog[-1]["primary"]["eiger_image"]
            seen.append((image.shape[0], set(image.chunks[0])))
            np.testing.assert_array_equal(image[:50], eiger.frames[:50])
            np.testing.assert_array_equal(image[41], eiger.frames[41])

    take(eiger, {"phi": np.zeros(72)}, [catalog.writer, look])
    assert seen == [(50, {1})]  # every frame is a chunk of its own
