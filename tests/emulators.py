"""Compiles what plays CUDA device code on the host (tests/emulator/*.cpp) for ctypes."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLAGS = ["-std=c++20", "-ffp-contract=off", "-Wall", "-Wno-unknown-pragmas", "-fPIC", "-shared"]
FLAGS += ["-U_FORTIFY_SOURCE"]  # with it longjmp takes a jump between stacks for an attack


def build(name: str, csrc: Path = ROOT / "csrc", optimize: bool = True) -> ctypes.CDLL:
    """The library of ``tests/emulator/<name>.cpp`` and the device code in ``csrc``.

    It is compiled unless that was done before.
    """
    tests = ROOT / "tests"
    flags = [*FLAGS, "-O1" if optimize else "-O0"]
    sources = [*csrc.glob("**/*.hpp"), *csrc.glob("**/*.h"), *(tests / "emulator").glob("*")]
    digest = hashlib.sha256(" ".join(flags).encode())
    for source in sorted(sources, key=lambda path: path.name):
        digest.update(source.read_bytes())
    library = ROOT / "build" / "emulator" / f"{name}-{digest.hexdigest()[:16]}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            made = Path(folder) / library.name
            command = [os.environ.get("CXX", "g++"), *flags, f"-I{csrc}", f"-I{tests}"]
            command += [str(tests / "emulator" / f"{name}.cpp"), "-o", str(made)]
            run = subprocess.run(command, capture_output=True, text=True)
            assert run.returncode == 0, run.stderr
            made.rename(library)
    return ctypes.CDLL(str(library))


@dataclass(frozen=True)
class Mistake:
    """An edit of device code that must be noticed."""

    name: str
    file: str
    """Below ``csrc``."""
    old: str
    """Stands exactly once in the file."""
    new: str

    def build(self, library: str, folder: Path) -> ctypes.CDLL:
        """The library with this edit, made of a copy of ``csrc`` in ``folder``."""
        csrc = folder / "csrc"
        shutil.copytree(ROOT / "csrc", csrc)
        file = csrc / self.file
        text = file.read_text()
        assert text.count(self.old) == 1, f"the mistakes must follow the code: {self.old}"
        file.write_text(text.replace(self.old, self.new))
        return build(library, csrc, optimize=False)
