"""Open the beamline that BCMI_BEAMLINE, BCMI_DIRECTORY and BCMI_SIM describe; closed when IPython leaves."""

import atexit
import sys

from bluesky_queueserver import is_re_worker_active

from bcmi_beamline.session import session_from_environment

try:
    session = session_from_environment()
except Exception as error:
    if is_re_worker_active():
        raise  # the worker reports it to whoever opens the environment
    sys.exit(f"bcmi: {error}")
atexit.register(session.close)
RE = session.RE
catalog = session.catalog.client
