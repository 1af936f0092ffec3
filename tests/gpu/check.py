"""``make gpu-check``: all that only a machine with a GPU can say, into docs/performance/.

The tests of this folder; those marked ``sanitize`` under compute-sanitizer; the training scenarios
on the GPU, against the goldens of the CPU; the benchmarks. Writes ``docs/performance/<gpu>.md`` and
one JSON file per benchmark. The exit code is 0 only if everything ran and passed.
"""

import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDER = "tests/gpu"
SANITIZERS = ("memcheck", "racecheck", "synccheck")
COLLECTIVES = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "broadcast")
TRAINED = ("S1", "S2", "S4")
"""Cases that train; their ranks share the GPUs there are."""
SIZES = ("-b", "4K", "-e", "256M", "-f", "4")
BENCHES = (
    ("vocab_entropy", "--device", "cuda", "-n", "20"),
    ("fused", "--device", "cuda", "-n", "10"),
    (*COLLECTIVES, "--device", "cuda", "--against", "symmetric", *SIZES, "-n", "10"),
)
"""Arguments of ``testbed bench``."""


def run(command: Sequence[str]) -> tuple[int, str]:
    """Shows the output while it comes; the exit code and the output."""
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    return process.wait(), "".join(lines)


def find_sanitizer() -> str | None:
    """compute-sanitizer, on PATH or in the CUDA toolkit."""
    found = shutil.which("compute-sanitizer")
    usual = Path("/usr/local/cuda/bin/compute-sanitizer")
    return found or (str(usual) if usual.exists() else None)


def last_line(output: str) -> str:
    """What a command said at its end."""
    lines = output.strip().splitlines()
    return lines[-1].strip("= ") if lines else "no output"


def tests() -> tuple[bool, str]:
    """Whether the tests passed, and what to report."""
    code, output = run([sys.executable, "-m", "pytest", FOLDER])
    return code == 0, f"`pytest {FOLDER}`: {last_line(output)}"


def sanitized(sanitizer: str | None, tool: str) -> tuple[bool, str]:
    """The same of the sample under a sanitizer."""
    if sanitizer is None:
        return False, f"{tool}: not run, compute-sanitizer was not found"
    pytest = [sys.executable, "-m", "pytest", FOLDER, "-m", "sanitize", "--timeout", "3600"]
    code, output = run([sanitizer, "--tool", tool, "--error-exitcode", "9", *pytest])
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", output)
    return code == 0, f"compute-sanitizer {tool}: {summary[-1] if summary else last_line(output)}"


def scenario(case: str) -> tuple[bool, str]:
    """Whether training there gave the golden, bit for bit."""
    arguments = ("run", case, "--device", "cuda")
    code, output = run([sys.executable, "-m", "scenarios", *arguments])
    return code == 0, f"`testbed {' '.join(arguments)}`:\n\n```\n{output.rstrip()}\n```"


def benchmark(arguments: Sequence[str], name: str) -> tuple[bool, str]:
    """Whether it ran, and its table."""
    file = f"docs/performance/{name}_{arguments[0]}.json"
    code, output = run([sys.executable, "-m", "scenarios", "bench", *arguments, "-J", file])
    return code == 0, f"`testbed bench {' '.join(arguments)}`:\n\n```\n{output.rstrip()}\n```"


def main() -> int:
    """Runs everything, also after a failure, and writes the report."""
    sys.path.insert(0, str(Path(__file__).parent))
    from gpu_machine import gpu_description, missing_gpu

    if reason := missing_gpu():
        print(f"gpu-check: error: {reason}", file=sys.stderr)
        return 2
    description = gpu_description()
    name = re.sub(r"[^a-z0-9]+", "-", description.split(",")[0].split(" x ")[1].lower()).strip("-")
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    report = ROOT / "docs" / "performance" / f"{name}.md"
    report.parent.mkdir(exist_ok=True)
    sanitizer = find_sanitizer()
    results = [tests(), *(sanitized(sanitizer, tool) for tool in SANITIZERS)]
    results += [scenario(case) for case in TRAINED]
    results += [benchmark(arguments, name) for arguments in BENCHES]
    head = f"# {description}\n\n`make gpu-check` of commit {commit or 'unknown'}, " + (
        f"{datetime.now(UTC).isoformat(timespec='minutes')}.\n"
    )
    body = [f"- {'pass' if passed else 'FAIL'}: {text}\n" for passed, text in results]
    report.write_text(head + "\n" + "\n".join(body))
    passed = all(ok for ok, _ in results)
    print(f"gpu-check: {'pass' if passed else 'FAIL'}; {report.relative_to(ROOT)}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
