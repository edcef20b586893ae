"""One catalogue for the tests of this folder: its server takes seconds to start."""

import pytest

from bcmi_beamline.data import open_catalog


@pytest.fixture(scope="session")
def catalog(tmp_path_factory):
    folder = tmp_path_factory.mktemp("catalog")
    with open_catalog(folder, readable=[folder.parent]) as catalog:
        yield catalog
