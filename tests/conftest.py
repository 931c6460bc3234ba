"""Before anything imports torch: one thread, for test processes run side by side and sums depend on the number of threads."""

from __future__ import annotations

import os

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")
