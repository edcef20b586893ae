"""Runs cohere (pip install cohere-core, in an environment of its own) for `benchmarks/bcdi.py`.

    PYTHON benchmarks/bcdi_cohere.py AMPLITUDES.npy LIBRARY SEQUENCE IMAGE.npy

AMPLITUDES have their origin at ``n // 2``; LIBRARY is np or torch. Prints one JSON object: seconds of the
wall and of the processors for the whole sequence, and the last error. IMAGE gets the solution and its
support; ``-`` for none, and no shrink-wrap then.
"""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import redirect_stdout
from importlib import import_module

import numpy as np

SETTINGS = {
    "hio_beta": 0.9,
    "raar_beta": 0.45,
    "initial_support_area": (0.5, 0.5, 0.5),
}
SHRINK_WRAP = {
    "shrink_wrap_trigger": [1, 10],
    "shrink_wrap_type": "GAUSS",
    "shrink_wrap_gauss_sigma": 1.0,
    "shrink_wrap_threshold": 0.1,
    "twin_trigger": [2],
}
"""As in cohere's own examples."""


def main() -> None:
    amplitudes, library, sequence, image = sys.argv[1:5]
    create_rec = import_module("cohere_core.controller.phasing").create_rec
    parameters = {**SETTINGS, "algorithm_sequence": sequence}
    if image != "-":
        parameters |= SHRINK_WRAP
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        work = create_rec(parameters, amplitudes, library, -1, debug=True)
        wall, cpu = time.perf_counter(), time.process_time()
        work.iterate()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    if image != "-":
        found = [np.asarray(a) for a in (work.get_image(), work.get_support())]
        np.save(image, np.stack([found[0], found[1].astype(complex)]))
    print(json.dumps({"wall_s": wall, "cpu_s": cpu, "error": float(work.errs[-1])}))


if __name__ == "__main__":
    main()
