"""Files of runs are whole or absent, locked against others, found again, and refused if damaged."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import EXAMPLES
from mutations import with_mutations

from support import disk
from support.errors import InputError
from support.run.checkpoints import Checkpoints, by_name, from_names, read_checkpoint

ARRAYS = by_name(
    {
        "weight": np.arange(6, dtype=np.float32).reshape(2, 3),
        "step": np.array(7, np.int32),
        "empty": np.zeros((0, 3), np.float32),
        "transposed": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
    }
)


def save(checkpoints: Checkpoints, step: int, value: float = 0.0) -> None:
    checkpoints.save({"step": step}, {"value": np.full(3, value, np.float32)})
    checkpoints.wait()


# -------------------------------------------------------------------------------- files and folders


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    disk.write_json(path, {"a": 1})

    def fails(new: Path) -> None:
        new.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(
        InputError, match=r"results\.json cannot be written \(No space left on device\)"
    ):
        disk.write_whole(path, fails)
    assert json.loads(path.read_text()) == {"a": 1} and list(tmp_path.iterdir()) == [path]


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    folder = tmp_path / "best"
    for content in ("one", "other"):
        (tmp_path / "best.new").mkdir()  # what a killed run may leave
        (tmp_path / "best.new" / "old").write_text("old")

        def write(new: Path, content: str = content) -> None:
            new.mkdir()
            (new / content).write_text(content)

        disk.write_whole(folder, write)
        assert [path.name for path in folder.iterdir()] == [content] and list(
            tmp_path.iterdir()
        ) == [folder]


def test_a_folder_is_locked_to_other_processes(tmp_path: Path) -> None:
    """Until the holder ends, even if it is killed. No lock file remains."""
    folder = tmp_path / "runs" / "ft" / "seed-0"
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from support import disk; from pathlib import Path\n"
        "with disk.locked(Path(sys.argv[2])): print('locked', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(Path(disk.__file__).parents[1]), str(folder)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"locked\n"
    with (
        pytest.raises(InputError, match=r"another process writes to .*seed-0"),
        disk.locked(folder),
    ):
        pass
    holder.kill()
    holder.communicate()
    with disk.locked(folder):
        folder.mkdir()
    assert [path.name for path in folder.parent.iterdir()] == ["seed-0"]
    with disk.locked(tmp_path / "others" / "ft" / "seed-0"):
        assert (tmp_path / "others").exists()
    assert not (tmp_path / "others").exists()


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(InputError, match="seed-0 cannot be written"),
        disk.locked(tmp_path / "file" / "ft" / "seed-0"),
    ):
        pass


# -------------------------------------------------------------------------------------- checkpoints


def test_the_two_newest_are_kept(tmp_path: Path) -> None:
    """Saving a step twice makes one file. The newest is restored bit by bit."""
    with Checkpoints(tmp_path / "checkpoint") as checkpoints:
        assert checkpoints.newest() is None
        for step in (1, 2, 10, 10):
            save(checkpoints, step, step / 3)
    assert {path.name for path in (tmp_path / "checkpoint").iterdir()} == {
        "step-2.safetensors",
        "step-10.safetensors",
    }
    with Checkpoints(tmp_path / "checkpoint") as checkpoints:
        (found, arrays) = checkpoints.newest()
        assert found == {"step": 10}
        np.testing.assert_array_equal(arrays["value"], np.full(3, 10 / 3, np.float32))
        save(checkpoints, 11)
    assert {path.name for path in (tmp_path / "checkpoint").iterdir()} == {
        "step-10.safetensors",
        "step-11.safetensors",
    }


def test_damaged_checkpoints_are_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A damaged one after the newest intact one is overwritten or deleted, and not kept."""
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 4)
        save(checkpoints, 6)
    (tmp_path / "step-6.safetensors").write_bytes(
        (tmp_path / "step-6.safetensors").read_bytes()[:-1]
    )
    (tmp_path / "step-7.safetensors.new").write_bytes(b"half")  # what a killed run may leave
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.newest().progress == {"step": 4}
        assert f"checkpoint {tmp_path / 'step-6.safetensors'} is damaged" in capsys.readouterr().err
        save(checkpoints, 5)
    assert {path.name for path in tmp_path.iterdir()} == {
        "step-4.safetensors",
        "step-5.safetensors",
    }
    for path in tmp_path.iterdir():
        path.write_bytes(b"")
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(InputError, match=r"no checkpoint in .* is whole"),
    ):
        checkpoints.newest()


def test_a_failed_write_raises(tmp_path: Path) -> None:
    """In the next call, or at the end of the block."""
    (tmp_path / "checkpoint").write_text("a file where the folder should be")
    with pytest.raises(InputError, match=r"step-1\.safetensors cannot be written"):  # noqa: SIM117
        with Checkpoints(tmp_path / "checkpoint") as checkpoints:
            checkpoints.check()
            checkpoints.save({"step": 1}, ARRAYS)
    with Checkpoints(tmp_path / "checkpoint") as checkpoints:
        checkpoints.save({"step": 1}, ARRAYS)
        for method in (
            checkpoints.wait,
            checkpoints.check,
            lambda: checkpoints.save({"step": 2}, ARRAYS),
        ):
            with pytest.raises(InputError, match="cannot be written"):
                method()
        checkpoints._writing = None


@EXAMPLES
def test_any_damage_to_a_checkpoint_is_noticed(examples: int, tmp_path: Path) -> None:
    """With some bytes changed or an end missing, a checkpoint is read as it was written, or
    refused.
    """
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save({"step": 3, "best": 0.5}, ARRAYS)
    path = tmp_path / "step-3.safetensors"
    assert read_checkpoint(path).arrays.keys() == ARRAYS.keys()
    accepted = []

    def check(content: bytes) -> None:
        path.write_bytes(content)
        try:
            found = read_checkpoint(path)
        except Exception:
            return
        accepted.append(content)
        assert found.progress == {"step": 3, "best": 0.5}
        for name, array in ARRAYS.items():
            np.testing.assert_array_equal(found.arrays[name], array, strict=True)

    with_mutations(examples, path.read_bytes(), check)
    assert 0 < len(accepted) < examples  # the one without a change, at least


def test_names_of_arrays(tmp_path: Path) -> None:
    tree = {"state": [np.arange(3.0), np.int32(4)], "best": (np.zeros((2, 2)),)}
    arrays = by_name(tree)
    assert list(arrays) == ["best.0", "state.0", "state.1"]
    restored = from_names(arrays, tree)
    np.testing.assert_array_equal(restored["state"][0], tree["state"][0])
    del arrays["state.1"]
    arrays["best.0"] = np.zeros(2)
    with pytest.raises(InputError, match=r"state\.1 is none instead of int32 \(\)") as error:
        from_names(arrays, tree)
    assert "best.0 is float64 (2,) instead of float64 (2, 2)" in str(error.value)
    assert os.linesep not in str(error.value)
