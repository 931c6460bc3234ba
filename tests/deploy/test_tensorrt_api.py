"""Our TensorRT code against the real Python bindings of TensorRT 10 and 11, without a GPU.

The libraries behind the bindings refuse to load where there is no GPU. The bindings leave nine C functions undefined; a stub of
those, built here, is enough for them to load and to say which classes, methods, enums and arguments exist.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHECKER = Path(__file__).with_name("tensorrt_names.py")
SOURCES = [
    ROOT / "src/tessera/deploy/engine.py",
    ROOT / "src/tessera/inference/trt_library.py",
    ROOT / "src/tessera/inference/trt_runtime.py",
]
LIBRARIES = ("nvinfer", "nvonnxparser", "nvinfer_plugin")
POINTERS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getPluginRegistry",
)
STUB = (
    "".join(f"void *{name}(void) {{ return 0; }}\n" for name in POINTERS)
    + "int getNvOnnxParserVersion(void) { return 0; }\n"
    + "_Bool initLibNvInferPlugins(void) { return 1; }\n"
)


@pytest.fixture(scope="module", params=["10", "11"])
def environment(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables under which `import tensorrt` gives the real bindings of that major version over the stub."""
    major = request.param
    folder = tmp_path_factory.mktemp(f"tensorrt{major}")
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler to build the stub libraries with")
    _install(ROOT / f"envs/tensorrt{major}.lock", folder)
    source = folder / "stub.c"
    source.write_text(STUB)
    for library in LIBRARIES:
        name = f"lib{library}.so.{major}"
        subprocess.run(
            [compiler, "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", folder / name, source], check=True, timeout=60
        )
    package = folder / "tensorrt"
    package.mkdir()
    # The package `tensorrt` itself adds nothing but the libraries.
    (package / "__init__.py").write_text("from tensorrt_bindings import *\nfrom tensorrt_bindings import __version__\n")
    return {**os.environ, "LD_LIBRARY_PATH": str(folder), "PYTHONPATH": str(folder)}


def _install(lock: Path, folder: Path) -> None:
    """The wheel that the lock file names, nothing it depends on, into ``folder``."""
    options = ["--quiet", "--no-deps", "--require-hashes", "--target", str(folder), "-r", str(lock)]
    if (uv := shutil.which("uv")) is not None:
        command = [uv, "pip", "install", "--python", sys.executable, *options]
    elif importlib.util.find_spec("pip") is not None:
        command = [sys.executable, "-m", "pip", "install", *options]
    else:
        pytest.skip("neither uv nor pip to install the bindings with")
    answer = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if answer.returncode != 0:
        pytest.skip(f"the bindings of {lock.name} cannot be had: {answer.stderr.strip()[-300:]}")


def _check(environment: dict[str, str], *files: Path) -> dict[str, object]:
    answer = subprocess.run(
        [sys.executable, CHECKER, *files], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert answer.returncode == 0, answer.stderr
    found: dict[str, object] = json.loads(answer.stdout)
    return found


def test_every_name_that_our_code_uses_exists(environment: dict[str, str]) -> None:
    found = _check(environment, *SOURCES)
    assert found["problems"] == []
    # The walk really reached the calls that matter.
    expected = {
        "Builder.create_network",
        "Builder.build_serialized_network",
        "NetworkDefinitionCreationFlag.STRONGLY_TYPED",
        "IBuilderConfig.set_memory_pool_limit",
        "IBuilderConfig.set_timing_cache",
        "ITimingCache.serialize",
        "IOptimizationProfile.set_shape",
        "OnnxParser.parse",
        "ParserError.desc",
        "IProgressMonitor.step_complete",
        "Runtime.deserialize_cuda_engine",
        "ICudaEngine.create_execution_context",
        "ICudaEngine.get_tensor_profile_shape",
        "IExecutionContext.set_input_shape",
        "IExecutionContext.set_tensor_address",
        "IExecutionContext.execute_async_v3",
        "init_libnvinfer_plugins",
    }
    assert expected <= set(found["checked"])  # type: ignore[call-overload]  # JSON


ABSENT = [
    ("builder = trt.Builder(logger)\nbuilder.max_batch_size = 4", "Builder.max_batch_size does not exist"),
    ("trt.Builder(logger).build_cuda_engine(1)", "Builder.build_cuda_engine does not exist"),
    ("trt.MemoryPoolType.WORKSPACES", "MemoryPoolType.WORKSPACES does not exist"),
    ("trt.Builder(logger).create_network(1, 2)", "no form of Builder.create_network takes (_, _)"),
    ("trt.Builder(log=logger)", "no form of Builder takes (log=)"),
    (
        "profile = trt.Builder(logger).create_optimization_profile()\nprofile.set_shape('images', (1,), (1,), maximum=(1,))",
        "no form of IOptimizationProfile.set_shape takes (_, _, _, maximum=)",
    ),
    (
        "def run(context: trt.IExecutionContext):\n    context.execute_v9(0)",
        "IExecutionContext.execute_v9 does not exist",
    ),
    (
        "class Monitor(trt.IProgressMonitor):\n    def step_complete(self, phase_name):\n        return True",
        "IProgressMonitor.step_complete is called with 2 arguments, ours takes 1",
    ),
    (
        "class Monitor(trt.IProgressMonitor):\n    def on_step(self):\n        pass",
        "IProgressMonitor.on_step does not exist",
    ),
]


def test_absent_names_and_arguments_are_found(environment: dict[str, str], tmp_path: Path) -> None:
    files = []
    for index, (code, _) in enumerate(ABSENT):
        files.append(tmp_path / f"case{index}.py")
        files[-1].write_text(code + "\n")
    problems = _check(environment, *files)["problems"]
    assert isinstance(problems, list)
    for index, (_, message) in enumerate(ABSENT):
        assert [p for p in problems if p.startswith(f"case{index}.py") and message in p], (message, problems)
    assert len(problems) == len(ABSENT)


def test_precision_flags_are_gone_in_11(environment: dict[str, str], tmp_path: Path) -> None:
    """Why the engine stage knows strongly typed networks only."""
    code = tmp_path / "flags.py"
    code.write_text("config = trt.Builder(logger).create_builder_config()\nconfig.set_flag(trt.BuilderFlag.FP16)\n")
    found = _check(environment, code)
    assert bool(found["problems"]) == str(found["version"]).startswith("11.")


def test_our_logger_works_in_the_real_bindings(environment: dict[str, str]) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from tessera.inference import trt_library\n"
        "trt = trt_library.load()\n"
        "logger = trt_library.make_logger(trt)\n"
        "assert trt.init_libnvinfer_plugins(logger, '')\n"
        "logger.log(trt.ILogger.INFO, 'quiet'); logger.log(trt.ILogger.WARNING, 'loud'); logger.log(trt.ILogger.ERROR, 'bad')\n"
        "assert logger.errors == ['bad'], logger.errors\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code, ROOT / "src"], env=environment, capture_output=True, text=True, timeout=60
    )
    assert answer.returncode == 0, answer.stderr
    assert answer.stderr.splitlines() == ["tensorrt: loud", "tensorrt: bad"]
