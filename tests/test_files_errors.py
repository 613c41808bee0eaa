"""Atomic files, folder locks, and errors that end a command in one line."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from oat_dist import errors
from oat_dist.errors import CheckpointError, ConfigError, DataError, OatError, loss_not_finite, run_command
from oat_dist.files import folder_lock, fsync_folder, sha256_bytes, sha256_file, write_atomic


def test_checksums(tmp_path: Path) -> None:
    path = tmp_path / "x"
    data = bytes(range(256)) * 5000
    path.write_bytes(data)
    assert sha256_file(path) == sha256_bytes(data) == hashlib.sha256(data).hexdigest()


def test_write_atomic_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    write_atomic(path, "höher")
    assert path.read_bytes() == "höher".encode()
    write_atomic(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert [p.name for p in tmp_path.iterdir()] == ["x.txt"]
    fsync_folder(tmp_path)


def test_a_failed_write_leaves_the_old_content(tmp_path: Path) -> None:
    """A real limit on the size of files; Python ignores the signal, so the write fails as on a full disk."""
    path = tmp_path / "x.txt"
    write_atomic(path, "old")
    script = (
        "import pathlib, resource, sys\n"
        "from oat_dist.files import write_atomic\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n"
        "    write_atomic(pathlib.Path(sys.argv[1]), 'n' * 5000)\n"
        "except OSError as error:\n"
        "    print(type(error).__name__, error.errno)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["OSError", "27"]  # EFBIG
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["x.txt"]


def test_a_writer_killed_in_the_middle_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    write_atomic(path, "old")
    script = (
        "import os, pathlib, sys\n"
        "import oat_dist.files as files\n"
        "files.os.fsync = lambda descriptor: os.kill(os.getpid(), 9)\n"
        "files.write_atomic(pathlib.Path(sys.argv[1]), 'new')\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], check=False)
    assert done.returncode == -9
    assert path.read_text() == "old"
    write_atomic(path, "newer")  # the leftover is in nobody's way
    assert path.read_text() == "newer"


def test_folder_lock_shuts_out_another_process_and_ends_with_its_holder(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    script = (
        "import pathlib, sys\n"
        "from oat_dist.files import folder_lock\n"
        "with folder_lock(pathlib.Path(sys.argv[1]), 'busy'):\n"
        "    print('held', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    arguments = [sys.executable, "-c", script, str(folder)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(OatError, match=r"\Abusy, go away\Z"), folder_lock(folder, "busy, go away"):
            pytest.fail("two holders")
        with folder_lock(folder, "another name", name=".other"):
            pass
        holder.kill()
    with folder_lock(folder, "busy"):
        pass
    with folder_lock(folder, "busy"):  # released at the end of the block
        pass


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_folder_lock_on_what_cannot_be_a_folder(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("mine")
    folder = tmp_path / place
    with (
        pytest.raises(OatError, match=re.escape(f"{folder}: cannot be made or written to (")),
        folder_lock(folder, "busy"),
    ):
        pytest.fail("locked")
    assert (tmp_path / "file").read_text() == "mine"


def test_run_command_gives_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> int:
        raise DataError("x.tar: cut short; restore it")

    assert run_command(fail) == 2
    assert capsys.readouterr().err == "error: x.tar: cut short; restore it\n"
    assert run_command(lambda: 1) == 1

    def interrupted() -> int:
        raise KeyboardInterrupt

    assert run_command(interrupted) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_defect_of_ours_keeps_its_traceback() -> None:
    def broken() -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_command(broken)


def test_a_closed_pipe_is_no_error() -> None:
    script = (
        "import sys\n"
        "from oat_dist.errors import run_command\n"
        "def talk():\n"
        "    for number in range(100000):\n"
        "        print(number)\n"
        "    return 0\n"
        "sys.exit(run_command(talk))\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as talker:
        assert talker.stdout is not None and talker.stderr is not None
        assert talker.stdout.readline() == b"0\n"
        talker.stdout.close()
        assert talker.stderr.read() == b""
        assert talker.wait() == 141


def test_only_one_rank_speaks_of_an_error_that_all_have(tmp_path: Path) -> None:
    """Other ranks give rank 0 time to speak first, since the launcher ends all at the first exit."""
    script = (
        "import sys\n"
        "import oat_dist.errors as errors\n"
        "errors.time.sleep = lambda seconds: print('slept', seconds)\n"
        "def fail():\n"
        "    raise errors.ConfigError('wrong')\n"
        "sys.exit(errors.run_command(fail))\n"
    )
    for rank, said in (("0", ""), ("1", f"slept {errors._GRACE_SECONDS}\n")):
        done = subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "RANK": rank},
        )
        assert (done.returncode, done.stdout, done.stderr) == (2, said, "error: wrong\n")


def test_errors_are_value_errors() -> None:
    for kind in (ConfigError, DataError, CheckpointError):
        assert issubclass(kind, OatError)
    assert issubclass(OatError, ValueError)
    assert ConfigError.everywhere
    assert not DataError.everywhere


def test_loss_not_finite_names_step_phase_and_remedy(tmp_path: Path) -> None:
    error = loss_not_finite(1234, 2, "oat", tmp_path)
    assert error.everywhere
    assert str(error) == (
        "the loss is not finite at step 1,234 (epoch 3, phase oat); lower optim.lr or set optim.clip_norm, or bound "
        f"the targets with anchor.floor or anchor.center=probabilities; {tmp_path} keeps its checkpoints from before"
    )
    assert "anchor" not in str(loss_not_finite(1, 0, "cross_entropy", Path("runs/x")))
