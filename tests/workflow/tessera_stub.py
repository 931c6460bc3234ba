"""Stands in for the command line in workflow tests: writes every file that the stage promises, in no time.

Each call is appended to calls.txt. ``FAIL=<verb>`` in the environment makes that verb fail, ``WAIT=<verb>`` makes it
wait for the file `go`.
"""

import os
import sys
import time
from pathlib import Path

verb, *rest = sys.argv[1:]
subject = "" if rest[0].startswith("--") else rest.pop(0)
options = dict(zip(rest[::2], rest[1::2], strict=True))
runtime = options.get("--runtime", "torch")
prefix = "" if runtime == "torch" else f"{runtime}_"
suffix = {"fp32": "", "fp16": ".fp16"}[options.get("--precision", "fp32")]
suffix += f".{options['--testing']}" if "--testing" in options else ""
folder = Path("results") / subject
EVALUATION = (".json", ".predictions.json.gz", ".statistics.json.gz")
outputs = {
    "demo": [Path(options.get("--data-root", "")) / subject / "manifest.json"],
    "fetch": [Path("data") / subject / "fetch.json"],
    "convert": [Path("data") / subject / "converted" / name for name in ("manifest.json", "dropped.csv")],
    "check": [Path(options.get("--out", ""))],
    "train": [folder / name for name in ("model.pth", "metrics.csv", "train.json")],
    "export": [folder / "model.onnx", folder / "export.json"],
    "precision": [folder / "model.fp16.onnx", folder / "precision.fp16.json"],
    "engine": [folder / f"model{suffix}.engine", folder / f"model{suffix}.engine.json"],
    "parity": [folder / f"{prefix}parity{suffix}.json"],
    "evaluate": [folder / f"{prefix}eval{suffix}{end}" for end in EVALUATION],
    "infer": [folder / f"{prefix}inference{suffix}" / "index.json"],
    "metrics": [Path("results/metrics.json"), Path("results/metrics.csv")],
    "figures": [
        Path("results/figures") / subject / f"{name}.{end}"
        for name in ("curves", "accuracy_time", "classes", "pictures")
        for end in ("png", "pdf")
    ]
    + [Path("results/figures") / subject / "figures.json"],
    "compare": [Path("results/tables") / f"{subject}.{end}" for end in ("csv", "md", "tex", "html", "json")],
}[verb]
with Path("calls.txt").open("a") as calls:
    calls.write(" ".join(sys.argv[1:]) + "\n")
if os.environ.get("FAIL") == verb:
    sys.exit(f"error: {verb} fails because the test says so")
while os.environ.get("WAIT") == verb and not Path("go").exists() and Path("calls.txt").exists():
    time.sleep(0.05)
for path in outputs:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{verb} {subject} {options.get('--expect', '')}\n")
