"""Live table, plots, progress, and devices that print where they are."""

from bcmi_beamline.prompt import install_displays, install_representations

install_displays(session)
try:
    install_representations(get_ipython(), session)
except NameError:
    pass  # the queue server's worker runs these files without IPython
