"""The end of a command: bad input, Ctrl-C, and outputs that are closed, narrow, or files."""

import os
import select
import subprocess
import sys
from pathlib import Path

import pytest

from support import errors

ROOT = Path(errors.__file__).parents[1]


def python(code: str, **more: object) -> subprocess.Popen:
    """A process of its own that runs code after `from support.errors import *`."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | more.pop("env", {})
    command = [sys.executable, "-c", f"import sys; from support.errors import *; {code}"]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, **more)


def test_ctrl_c_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        raise KeyboardInterrupt

    assert errors.exit_code(command) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")]
)
def test_lack_of_memory_is_one_line(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        raise error

    assert errors.exit_code(command) == 2
    assert capsys.readouterr().err == (
        "error: out of memory: use a machine or device that has more\n"
    )


def test_other_faults_raise() -> None:
    def command() -> None:
        raise RuntimeError("of ours")

    with pytest.raises(RuntimeError, match="of ours"):
        errors.exit_code(command)


INTERRUPT = "signal.raise_signal(signal.SIGINT)"


@pytest.mark.parametrize(
    "code",
    [
        INTERRUPT,
        f"exec('try: {INTERRUPT}\\nfinally: raise ImportError')",
        f"x = type('X', (), {{'__del__': lambda self: {INTERRUPT}}})(); del x",
    ],
)
def test_ctrl_c_at_any_time_is_one_line(code: str) -> None:
    """Also where a library turns it into an error of its own, or where Python ignores what a
    callback raises.
    """
    # It may be ignored here
    handled = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    process = python(f"{handled}; quiet_interrupts(); {code}")
    assert (process.communicate(timeout=60)[1], process.returncode) == (b"interrupted\n", 130)


def test_faults_of_ours_keep_their_traceback() -> None:
    process = python("quiet_interrupts(); exit_code(lambda: 1 / 0)")
    assert b"ZeroDivisionError" in process.communicate(timeout=60)[1] and process.returncode == 1


def test_output_that_is_closed_by_its_reader() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    process = python("sys.exit(exit_code(lambda: print('x' * 100_000)))", stdout=writer)
    os.close(writer)
    assert (process.communicate(timeout=60)[1], process.returncode) == (b"", 141)


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_output_that_is_closed_from_the_start(stream: str) -> None:
    code = f"sys.{stream} = None; sys.exit(exit_code(lambda: print('x', file=sys.{stream})))"
    process = python(code, stdout=subprocess.PIPE)
    assert process.communicate(timeout=60) == (b"", b"") and process.returncode == 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has it")
@pytest.mark.parametrize(
    ("stream", "logs", "code"),
    [("stdout", True, 0), ("stderr", True, 0), ("stdout", False, 2), ("stderr", False, 0)],
)
def test_output_on_a_full_disk(stream: str, logs: bool, code: int) -> None:
    """A log is lost without an end of the command; a result is an error, in one line."""
    script = f"for _ in range(3): print('x' * 20_000, file=sys.{stream})\nprint('done')"
    with open("/dev/full", "w") as full:
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: full}
        command = "import sys; from support.errors import exit_code\n"
        command += f"sys.exit(exit_code(lambda: exec({script!r}), logs={logs}))"
        done = subprocess.run(
            [sys.executable, "-c", command], cwd=ROOT, text=True, timeout=60, **streams
        )
    advice = "make room, or write it elsewhere"
    error = f"error: the output cannot be written ([Errno 28] No space left on device): {advice}\n"
    assert done.returncode == code
    assert done.stderr == (None if stream == "stderr" else error if code else "")
    assert done.stdout == (None if stream == "stdout" else "done\n")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_characters_that_an_output_lacks(encoding: str) -> None:
    code = "sys.exit(exit_code(lambda: print('75.6 \u00b1 0.2 \u72ac')))"
    process = python(code, stdout=subprocess.PIPE, env={"PYTHONIOENCODING": encoding})
    output, problem = process.communicate(timeout=60)
    assert (
        output.strip() == "75.6 \u00b1 0.2 \u72ac".encode(encoding, "replace")
        and process.returncode == 0
    ), problem


def test_lines_arrive_when_they_are_printed() -> None:
    """In a pipe or a file, not when the command ends."""
    process = python(
        "exit_code(lambda: (print('first'), sys.stdin.read()))",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert select.select([process.stdout], [], [], 60)[0]
    assert process.stdout.readline().strip() == b"first"
    process.communicate(timeout=60)


def test_home_folder_in_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    given = ["--out=~/runs", "--data-root", "~/set", "~", "a~/b", "--templates", "~ a {}"]
    expected = [
        "--out=/home/me/runs",
        "--data-root",
        "/home/me/set",
        "/home/me",
        "a~/b",
        "--templates",
        "~ a {}",
    ]
    assert errors.expanded(given) == expected
