"""Every plan of the package with the devices filled in, bluesky's own, and dry runs."""

import bluesky.plan_stubs as bps  # noqa: F401
import bluesky.plans as bp  # noqa: F401

from bcmi_beamline.prompt import bound_dry_run
from bcmi_beamline.session import bind_plans

globals().update(bind_plans(devices, RE.md))
dry_run = bound_dry_run(session)
