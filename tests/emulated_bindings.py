"""``primitives`` on the emulated CUDA runtime: its bindings as built, without the CUDA objects.

The objects that ``make build`` compiled of csrc/ are linked anew, with tests/emulator/runtime.cpp
in the place of the CUDA runtime and kernels, and tests/emulator/torch_device.cpp for torch's CUDA
tensors. A process that calls ``install`` first has them as ``primitives._C``.
"""

import hashlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType

import torch
from torch.utils.cpp_extension import include_paths, library_paths

ROOT = Path(__file__).resolve().parent.parent
OBJECTS = ROOT / "build" / f"objects-{sys.implementation.cache_tag}" / "csrc"
EMULATION = ("runtime.cpp", "torch_device.cpp")
FLAGS = ["-std=c++20", "-O1", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden", "-pthread"]
FLAGS += ["-Wno-unknown-pragmas", "-DTORCH_API_INCLUDE_EXTENSION_H"]
LIBRARIES = ["-lc10", "-ltorch", "-ltorch_cpu", "-ltorch_python", "-lrt", "-ldl"]


def missing() -> str | None:
    """Why they cannot be linked; None if they can."""
    from primitives import _C

    if not _C.cuda_built:
        return "this build of primitives has no CUDA host code (there was no nvcc)"
    return None


def _run(command: list[str]) -> None:
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def build() -> Path:
    """The extension module, linked unless that was done before."""
    assert OBJECTS.exists(), f"the build left no objects in {OBJECTS}: run make build"
    emulator = ROOT / "tests" / "emulator"
    csrc = ROOT / "csrc"
    names = sorted(file.relative_to(csrc) for file in csrc.glob("**/*.cpp"))
    objects = [OBJECTS / file.with_suffix(".o") for file in names]
    sources = [*sorted(emulator.glob("*")), *sorted(csrc.glob("collectives/cuda/*.hpp"))]
    digest = hashlib.sha256(f"{FLAGS} {torch.__version__}".encode())
    for file in [*objects, *sources]:
        digest.update(file.read_bytes())
    module = ROOT / "build" / "emulator" / f"bindings-{digest.hexdigest()[:16]}.so"
    if module.exists():
        return module
    module.parent.mkdir(parents=True, exist_ok=True)
    includes = [f"-I{csrc}", f"-I{ROOT / 'tests'}", f"-I{sysconfig.get_path('include')}"]
    includes += [f"-isystem{path}" for path in include_paths()]
    compiler = os.environ.get("CXX", "g++")
    with tempfile.TemporaryDirectory(dir=module.parent) as folder:
        instead = [str(Path(folder) / f"{name}.o") for name in EMULATION]
        for name, object_ in zip(EMULATION, instead, strict=True):
            _run([compiler, *FLAGS, *includes, "-c", str(emulator / name), "-o", object_])
        # Kernels that are no collectives are missing: functions are looked up when they are called.
        link = [compiler, "-shared", "-Wl,-z,lazy", *map(str, objects), *instead]
        link += [flag for path in library_paths() for flag in (f"-L{path}", f"-Wl,-rpath,{path}")]
        made = Path(folder) / "bindings.so"
        _run([*link, *LIBRARIES, "-o", str(made)])
        made.rename(module)
    return module


def _load(name: str, file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[name] = module
    return module


def install(file: str) -> ModuleType:
    """Makes ``build()``'s file this process's ``primitives._C``; the functions of torch_device."""
    import primitives

    assert "primitives._C" not in sys.modules, "primitives._C is loaded already"
    torch.cuda.get_device_capability = lambda device=None: (9, 0)  # dist.broadcast asks
    flags = sys.getdlopenflags()
    sys.setdlopenflags(os.RTLD_LAZY)
    try:
        primitives._C = _load("primitives._C", Path(file))  # type: ignore[attr-defined]
        return _load("emulated_device", Path(file))
    finally:
        sys.setdlopenflags(flags)
