"""Ports of their own for every test process, and one simulated beamline for those that ask."""

from __future__ import annotations

import pytest

from bcmi_beamline.sim.launch import SimulatedBeamline, claim_ports

claim_ports()  # before any test module imports ophyd: libca reads its environment once


@pytest.fixture(scope="session")
def simulated_beamline(tmp_path_factory: pytest.TempPathFactory):
    """The simulated beamline of preset ``small``, answering on Channel Access."""
    with SimulatedBeamline("small", data_dir=tmp_path_factory.mktemp("beamline")) as running:
        yield running
