"""A scan while it runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from bcmi_beamline.scans import PtychographyScan


def growing(
    load: Callable[[], PtychographyScan], ended: Callable[[], bool], wait_s: float = 1.0
) -> Iterator[PtychographyScan]:
    """Yield a running scan again and again, each time with all the frames it has by then, until it ends.

    Parameters
    ----------
    load : callable
        Returns the scan so far; ValueError where there is nothing to load yet.
    ended : callable
        Whether the scan is over, so that what is loaded afterwards is all of it.
    wait_s : float
        Between two looks that find nothing new.

    Raises
    ------
    ValueError
        What `load` raises of a scan that is over.
    """
    seen = 0
    while True:
        over = ended()
        try:
            scan = load()
        except ValueError:
            if over:
                raise
            scan = None
        if scan is not None and len(scan.frames) > seen:
            seen = len(scan.frames)
            yield scan
        elif not over:
            time.sleep(wait_s)
        if over:
            return
