"""Training: a LightningModule around the parts it is given, with exact resume.

Read `train.py` (the stage), then `loop.py` (what happens after every step) and `state.py` with `checkpoint.py` (what a restart needs).
"""

import os

# Before torch is loaded: a training has its own number of threads, whatever the machine has to spare, and threads that wait for each
# other in a loop on cores that others need make it several times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
