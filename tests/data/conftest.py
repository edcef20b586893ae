"""One catalogue for the tests of this folder: its server takes seconds to start."""

import pytest

from bcmi_beamline.data import open_catalog


@pytest.fixture(scope="session")
def catalog_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("catalog")


@pytest.fixture(scope="session")
def catalog(catalog_folder):
    with open_catalog(catalog_folder, readable=[catalog_folder.parent]) as catalog:
        yield catalog
