"""Training: a LightningModule around the parts it is given, with exact resume.

Read `train.py` (the stage), then `loop.py` (what happens after every step) and `state.py` with `checkpoint.py` (what a restart needs).
"""
