"""Builds ``primitives._C``: C++ for every machine, CUDA kernels when an nvcc is found.

Environment (documented in primitives/env.py):
  PRIMITIVES_CUDA=0|1    leave the CUDA kernels out | make a missing nvcc an error
  PRIMITIVES_NVCC=PATH   which nvcc
  PRIMITIVES_CUDA_ARCHS  targets, default "80;90;100" (the last one also as PTX)

nvcc never sees a torch header, and cudart is linked statically: the extension builds on a CPU-only
torch and imports on a machine without a driver.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).parent
CXX_FLAGS = ["-std=c++20", "-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=off", "-Wall"]


def find_nvcc() -> str | None:
    """The nvcc to use, or None for a CPU-only build."""
    wish = os.environ.get("PRIMITIVES_CUDA", "auto")
    if wish == "0":
        return None
    candidates = [os.environ.get("PRIMITIVES_NVCC")]
    candidates += [
        os.path.join(os.environ[name], "bin", "nvcc")
        for name in ("CUDA_HOME", "CUDA_PATH")
        if name in os.environ
    ]
    candidates += [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    for nvcc in candidates:
        if nvcc and os.path.exists(nvcc):
            probe = subprocess.run([nvcc, "--version"], capture_output=True, text=True)
            if probe.returncode == 0:
                return nvcc
    if wish == "1":
        raise SystemExit("PRIMITIVES_CUDA=1, but no working nvcc was found")
    return None


def static_cudart_dir(nvcc: str) -> str:
    """The folder of libcudart_static.a, asked of nvcc itself (PATH may hold only a wrapper)."""
    dry = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", os.devnull, "-o", os.devnull],
        capture_output=True,
        text=True,
    ).stderr
    libraries = " ".join(re.findall(r"#\$ LIBRARIES=(.*)", dry))
    folders = re.findall(r'-L"?([^" ]+)', libraries)
    if top := re.search(r"#\$ TOP=(.*)", dry):
        folders += [
            os.path.join(top[1].strip(), tail)
            for tail in ("lib64", "lib", "targets/x86_64-linux/lib")
        ]
    for folder in folders:
        if os.path.exists(os.path.join(folder, "libcudart_static.a")):
            return os.path.realpath(folder)
    raise SystemExit(f"libcudart_static.a was not found beside {nvcc}; looked in {folders}")


class Build(BuildExtension):
    """Compiles ``csrc/**/*.cu`` with nvcc, links the objects in, says what it built.

    Objects stay in ``build/``: after a change only what includes it is compiled again.
    """

    def finalize_options(self) -> None:
        self.build_temp = str(ROOT / "build" / f"objects-{sys.implementation.cache_tag}")
        super().finalize_options()

    def build_extensions(self) -> None:
        nvcc = find_nvcc()
        archs = os.environ.get("PRIMITIVES_CUDA_ARCHS", "80;90;100").split(";")
        for extension in self.extensions:
            if nvcc:
                extension.extra_objects += self.compile_cuda(nvcc, archs)
                extension.define_macros.append(("PRIMITIVES_CUDA", "1"))
                extension.extra_link_args += [
                    "-L" + static_cudart_dir(nvcc),
                    "-Wl,--exclude-libs,libcudart_static.a",
                    "-l:libcudart_static.a",
                    "-ldl",
                    "-lrt",
                    "-lpthread",
                ]
        super().build_extensions()
        cuda = "none (no nvcc)"
        if nvcc:
            sources = sorted(ROOT.glob("csrc/**/*.cu"))
            names = ", ".join(str(s.relative_to(ROOT / "csrc").with_suffix("")) for s in sources)
            cuda = f"sm_{', sm_'.join(archs)} by {nvcc}: {names}"
        summary = (
            "build summary\n"
            f"  torch   {torch.__version__}\n"
            "  cpu     AVX-512 (also BF16), AVX2, scalar (chosen at run time)\n"
            f"  cuda    {cuda}\n"
        )
        print("\n" + summary)
        (ROOT / "build").mkdir(exist_ok=True)
        (ROOT / "build" / "summary.txt").write_text(summary)  # pip hides what is printed here

    def compile_cuda(self, nvcc: str, archs: list[str]) -> list[str]:
        targets = [
            flag for a in archs for flag in ("-gencode", f"arch=compute_{a},code=sm_{a}")
        ] + ["-gencode", f"arch=compute_{archs[-1]},code=compute_{archs[-1]}"]
        objects = []
        folder = Path(self.build_temp, f"sm_{'_'.join(archs)}")
        for source in sorted(ROOT.glob("csrc/**/*.cu")):
            target = folder / source.relative_to(ROOT).with_suffix(".cu.o")
            objects.append(str(target))
            headers = [h for kind in ("h", "hpp", "cuh") for h in ROOT.glob(f"csrc/**/*.{kind}")]
            headers.append(source)
            if target.exists() and target.stat().st_mtime > max(h.stat().st_mtime for h in headers):
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            flags = ["-O3", "-std=c++17", "-fmad=false", "-Icsrc", "-cudart", "static"]
            flags += ["-Xcompiler", "-fPIC,-fvisibility=hidden", "--threads", "0", *targets]
            subprocess.run(
                [nvcc, "-c", str(source), "-o", str(target), *flags], check=True, cwd=ROOT
            )
        return objects


setup(
    ext_modules=[
        CppExtension(
            "primitives._C",
            [str(p.relative_to(ROOT)) for p in sorted(ROOT.glob("csrc/**/*.cpp"))],
            include_dirs=[str(ROOT / "csrc")],
            extra_compile_args=CXX_FLAGS,
            extra_link_args=["-lrt"],
        )
    ],
    cmdclass={"build_ext": Build},
)
