"""What the tests of the packer share: images, the contents of folders, real packers in processes of their own."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from oat_dist.data.packing.samples import Sample


def image(kind: str = "JPEG", *, seed: int = 0, size: tuple[int, int] = (12, 8), **options: object) -> bytes:
    """A noisy RGB image of `size` (width, height)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def some_samples(count: int = 30) -> list[Sample]:
    kinds = ("JPEG", "PNG", "WEBP")
    return [
        Sample(f"{'ab'[i % 2]}/{i:03d}.jpg", "ab"[i % 2], image(kinds[i % 3], seed=i, size=(8 + i % 5, 9)))
        for i in range(count)
    ]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def visible(folder: Path) -> list[str]:
    """All that lies in an output folder but the lock file, hidden folders included."""
    return sorted(p.name for p in folder.iterdir() if p.name != ".packing.lock") if folder.exists() else []


def identities(folder: Path, pattern: str) -> dict[str, tuple[int, int]]:
    """Inode and time of modification by name: a file written again has others."""
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in sorted(folder.glob(pattern))}


def image_folder(folder: Path, count: int) -> Path:
    """`count` JPEGs of two classes."""
    for i in range(count):
        path = folder / "ab"[i % 2] / f"{i:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image(seed=i))
    return folder


COMMAND = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that runs us in the background has it ignored
from oat_dist.commands.pack import main
raise SystemExit(main(sys.argv[1:]))
"""


def start_pack(*arguments: object) -> subprocess.Popen[str]:
    """The real command, in a process group of its own, as a terminal starts it."""
    command = [sys.executable, "-c", COMMAND, *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, env=_environment()
    )


def run_python(program: str, *arguments: object) -> str:
    """The standard output of a program, which must succeed and be silent on stderr."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=_environment())
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def _environment() -> dict[str, str]:
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.002)


def children(process: int) -> list[int]:
    with contextlib.suppress(FileNotFoundError):
        return [int(pid) for pid in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    return []


def is_alive(process: int) -> bool:
    """Zombies that nobody waits for count as dead."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
