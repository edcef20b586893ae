"""Live table, plots, progress, and devices that print where they are."""

from contextlib import suppress

from bcmi_beamline.prompt import install_displays, install_representations

install_displays(session)
with suppress(NameError):  # the queue server's worker runs these files without IPython
    install_representations(get_ipython(), session)
