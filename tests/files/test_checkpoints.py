"""Files of runs are whole or absent, locked against others, found again, and refused if damaged."""

import errno
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from conftest import EXAMPLES
from mutations import with_mutations
from safetensors.numpy import save_file

from support import disk
from support.errors import InputError
from support.run import finished
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


def no_flush(descriptor: int) -> None:
    """As CIFS and vboxsf: files can be flushed, folders cannot."""
    if stat.S_ISDIR(os.fstat(descriptor).st_mode):
        raise OSError(errno.EINVAL, "Invalid argument")


def no_permissions(*_: object, **__: object) -> None:
    raise PermissionError(errno.EPERM, "Operation not permitted")


# What others make in every folder of a run.
FOREIGN = [".ipynb_checkpoints/x", "@eaDir/SYNO", ".nfs0001", "lost+found/y", "notes.txt"]
FILE_SYSTEMS = {
    "usual": {},
    "no flush of folders": {"fsync": no_flush},
    "no permissions": {"chmod": no_permissions},
}


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
@pytest.mark.parametrize("name", FILE_SYSTEMS)
def test_any_file_system_and_owner(
    name: str, umask: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written is whole, as the user's umask has it, and other files stay."""
    for function, replacement in FILE_SYSTEMS[name].items():
        monkeypatch.setattr(os, function, replacement)
    monkeypatch.setattr(disk, "_UMASK", umask)
    folder = tmp_path / "ft" / "seed-0"
    for place in (folder, folder / "checkpoint", folder / "best"):
        for foreign in FOREIGN:
            (place / foreign).parent.mkdir(parents=True, exist_ok=True)
            (place / foreign).write_text("foreign")

    def write(new: Path) -> None:
        new.mkdir()
        save_file({"a": np.zeros(2, np.float32)}, new / "model.safetensors")
        (new / "config.json").write_text(str(value))

    for value in (1, 2):
        (folder / "best.new").mkdir()  # what a killed run may leave
        (folder / "best.new" / "old").write_text("old")
        disk.write_json(folder / "config.json", value)
        disk.write_whole(folder / "best", write)
    with Checkpoints(folder / "checkpoint") as checkpoints:
        (folder / "checkpoint/step-0.safetensors.new").write_bytes(b"half")
        for step in (1, 2, 3):
            save(checkpoints, step)
    own = {"config.json", "best/model.safetensors", "best/config.json"}
    own |= {f"checkpoint/step-{step}.safetensors" for step in (2, 3)}
    foreign = {f"{place}{file}" for place in ("", "best/", "checkpoint/") for file in FOREIGN}

    def found() -> set[str]:
        files = [path for path in folder.rglob("*") if path.is_file()]
        return {str(path.relative_to(folder)) for path in files}

    assert found() == own | foreign
    assert (folder / "config.json").read_text() == "2\n"
    assert (folder / "best/config.json").read_text() == "2"
    assert {str(path.relative_to(folder)) for path in finished.run_files(folder)} == own
    if name != "no permissions":
        modes = {file: (folder / file).stat().st_mode & 0o777 for file in own if "saf" in file}
        assert modes == dict.fromkeys(modes, 0o666 & ~umask)
    finished.delete_run(folder)
    assert found() == foreign and finished.run_files(folder) == []


def test_a_run_is_deleted_with_its_folder(tmp_path: Path) -> None:
    """If there is nothing else in it; also what a killed run left."""
    folder = tmp_path / "ft" / "seed-0"
    names = ["results.json", "metrics.jsonl.new", "best.new/model.safetensors"]
    names += ["best/member-1/head.safetensors", "best/member-2.new/classes.json"]
    names += ["checkpoint/step-2.safetensors", "checkpoint/step-4.safetensors.new"]
    names += ["tensorboard/events.out.tfevents.1.host", "profile/plugins/profile/1/a.xplane.pb"]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    assert len(finished.run_files(folder)) == len(names)
    finished.delete_run(folder)
    assert list(tmp_path.rglob("*")) == [tmp_path / "ft"]
    finished.delete_run(folder)


@pytest.mark.parametrize(
    ("run", "mounts", "expected"),
    [
        ("runs/ft/seed-0", [], "runs/ft+wise/seed-0"),
        ("runs/ft/best one", [], "runs/ft+wise/best one"),
        ("runs/mine/seed-0", [], "runs/mine/ft+wise/seed-0"),  # moved: beside the run
        ("model", [], "ft+wise/model"),
        ("model", ["model"], "model/ft+wise/model"),  # inside, for what is beside is not given
        ("mount/seed-0", ["mount"], "mount/ft+wise/seed-0"),
        ("ft/seed-0", ["ft"], "ft/ft+wise/seed-0"),
        ("runs/ft/seed-0", ["runs"], "runs/ft+wise/seed-0"),
        ("/model", [], "/model/ft+wise/model"),
        ("/ft/seed-0", [], "/ft/ft+wise/seed-0"),
        ("runs/../runs/ft/seed-0/", [], "runs/ft+wise/seed-0"),
        ("link", [], "ft+wise/link"),
    ],
)
def test_places_of_post_hoc_results(
    run: str, mounts: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the run, wherever it was moved or mounted, and never above a mount."""
    (tmp_path / "elsewhere/ft/seed-9").mkdir(parents=True)
    (tmp_path / "link").symlink_to("elsewhere/ft/seed-9")
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        os.path, "ismount", lambda path: str(path) in {str(tmp_path / mount) for mount in mounts}
    )
    opened = Mock(finished.FinishedRun, folder=Path(run), results={"method": "ft"})
    folder = finished.new_folder([opened], "ft+wise", False)
    assert folder == tmp_path / expected


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
        pytest.raises(
            InputError,
            match=r"another process writes to .*seed-0: wait .*, delete .*/ft/\.seed-0\.lock$",
        ),
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
