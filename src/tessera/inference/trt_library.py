"""Finding and loading the TensorRT library. Imports neither torch nor TensorRT, so that the workflow can ask while it plans."""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from typing import Any

from tessera.files import UserError

SUPPORTED = (10, 11)
"""Major versions whose Python interface the tests check (tests/deploy/test_tensorrt_api.py)."""

PLUGIN = "MultiscaleDeformableAttnPlugin_TRT"
"""Operator that TensorRT's own plugin library implements; see deploy.export."""


def availability() -> str | None:
    """Why this machine can neither build nor run engines, or None when it can.

    Takes milliseconds: the packages are looked up, not imported, and the driver is only asked for the number of devices.
    """
    missing = []
    if importlib.util.find_spec("tensorrt") is None:
        missing.append("the Python package tensorrt (`make tensorrt` installs it)")
    if gpu_count() == 0:
        missing.append("an NVIDIA GPU with its driver")
    return " and ".join(missing) or None


def gpu_count() -> int:
    """Devices that the NVIDIA driver offers to this process; 0 without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def require(purpose: str, instead: str) -> None:
    """Raises UserError when TensorRT cannot work here; ``purpose`` says what for, ``instead`` what this machine can do."""
    missing = availability()
    if missing is not None:
        raise UserError(f"{purpose} needs {missing}, which this machine has not. {instead}")


def load() -> Any:
    """The ``tensorrt`` module. Raises UserError when it, or the library behind it, is missing or of an unknown major version."""
    try:
        import tensorrt as trt
    except (ImportError, OSError) as error:
        raise UserError(
            f"the Python package tensorrt cannot be loaded ({error}); `make tensorrt` installs TensorRT 10 or 11"
        ) from None
    major = int(trt.__version__.split(".")[0])
    if major not in SUPPORTED:
        raise UserError(f"TensorRT {trt.__version__} is installed; expected 10 or 11, which `make tensorrt` installs")
    return trt


def make_logger(trt: Any, verbose: bool = False) -> Any:
    """A TensorRT logger that prints warnings (everything if ``verbose``) to stderr and keeps the errors in ``errors``."""
    threshold = trt.ILogger.VERBOSE if verbose else trt.ILogger.WARNING

    class Logger(trt.ILogger):  # type: ignore[misc]  # the base class exists only once TensorRT is loaded
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if int(severity) <= int(trt.ILogger.ERROR):
                self.errors.append(message)
            if int(severity) <= int(threshold):
                print(f"tensorrt: {message}", file=sys.stderr, flush=True)

    return Logger()
