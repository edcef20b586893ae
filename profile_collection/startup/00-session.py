"""Open the beamline that BCMI_BEAMLINE, BCMI_DIRECTORY and BCMI_SIM describe; closed when IPython leaves."""

import atexit

from bcmi_beamline.session import session_from_environment

session = session_from_environment()
atexit.register(session.close)
RE = session.RE
catalog = session.catalog.client
