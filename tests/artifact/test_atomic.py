"""A process that is killed while it saves leaves the old artifact or the new one."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fxpress
from fxpress.errors import ArtifactError

# Forks once per step of `save` on the file system, as Python's audit events tell them, and kills
# the child with SIGKILL right before that step; prints the marker that a load finds afterwards.
KILLED_AT_EACH_STEP = """
import os, shutil, signal, sys, warnings
import torch
import fxpress
warnings.simplefilter("ignore")
torch.set_num_threads(1)
old, new = fxpress.load(sys.argv[1]), fxpress.load(sys.argv[2])
target = sys.argv[3]
folder = os.path.dirname(target)
EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "os.listdir",
          "os.scandir", "shutil.rmtree", "fcntl.flock"}

def die_at(step):
    left = step
    def hook(event, arguments):
        nonlocal left
        if event in EVENTS and (event == "fcntl.flock" or folder in str(arguments)):
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

fresh = "--fresh" in sys.argv
if not fresh:
    old.save(target)
for step in range(1000):
    child = os.fork()
    if child == 0:
        die_at(step)
        new.save(target)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    try:
        print(status, fxpress.load(target).report.as_dict()["marker"], flush=True)
    except fxpress.errors.ArtifactError as error:
        print(status, "nothing" if "does not exist" in str(error) else repr(error), flush=True)
    if status == 0:
        break
    old.save(target)
    print("left", *sorted(os.listdir(folder)), flush=True)
    if fresh:
        shutil.rmtree(folder)
        os.mkdir(folder)
"""


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """An old and a new artifact, told apart by a marker in their reports."""
    saved = []
    for marker in ("old", "new"):
        o = fxpress.optimize(nn.Linear(2, 2).eval(), [torch.ones(1, 2)] * 2, judge="off")
        o.report.facts["marker"] = marker
        saved.append(o.save(tmp_path_factory.mktemp(marker) / "m"))
    return saved


def _killed(two: list[Path], target: Path, *options: str) -> tuple[list[str], list[str]]:
    """What was loaded after each kill, and what the next save left in the folder."""
    target.parent.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", KILLED_AT_EACH_STEP, *map(str, two), str(target), *options],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        timeout=300,
    )
    lines = done.stdout.splitlines()
    loaded = [line.partition(" ")[2] for line in lines if not line.startswith("left")]
    return loaded, [line for line in lines if line.startswith("left")]


@pytest.mark.parametrize("name", ["m.fxpress", "m.zip"])
def test_killed_at_each_step_of_replacing(two: list[Path], tmp_path: Path, name: str) -> None:
    loaded, left = _killed(two, tmp_path / "at" / name)
    assert len(loaded) > 20
    assert set(loaded) == {"old", "new"}
    assert loaded == sorted(loaded, reverse=True)  # old up to one step, and new from there on
    assert set(left) == {f"left {name}"}


@pytest.mark.parametrize("name", ["m.fxpress", "m.zip"])
def test_killed_at_each_step_of_the_first_save(two: list[Path], tmp_path: Path, name: str) -> None:
    loaded, left = _killed(two, tmp_path / "at" / name, "--fresh")
    assert len(loaded) > 20
    assert set(loaded) == {"nothing", "new"}
    assert loaded == sorted(loaded, reverse=True)
    assert set(left) == {f"left {name}"}


@pytest.mark.parametrize("name", ["m.fxpress", "m.zip"])
def test_a_save_that_fails_leaves_nothing(
    optimized: fxpress.OptimizedModule,
    tmp_path: Path,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    optimized.save(tmp_path / name)

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        optimized.save(tmp_path / name)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == [name]
    fxpress.load(tmp_path / name)


def test_what_another_process_is_writing_stays(
    optimized: fxpress.OptimizedModule, tmp_path: Path
) -> None:
    partial = tmp_path / ".m.partial-1234abcd"
    partial.mkdir()
    handle = os.open(partial, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    optimized.save(tmp_path / "m")
    assert partial.is_dir()
    os.close(handle)
    optimized.save(tmp_path / "m")
    assert not partial.exists()


def test_what_is_no_artifact_is_never_replaced(
    optimized: fxpress.OptimizedModule, tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder.zip").mkdir()
    for name in ("folder", "file", "folder.zip"):
        with pytest.raises(ArtifactError, match="is no fxpress artifact: save under another name"):
            optimized.save(tmp_path / name)
    assert (tmp_path / "folder" / "thesis.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    fxpress.load(optimized.save(tmp_path / "empty"))


def test_equal_modules_are_saved_as_equal_bytes(
    optimized: fxpress.OptimizedModule, tmp_path: Path
) -> None:
    first, second = (optimized.save(tmp_path / name).read_bytes() for name in ("a.zip", "b.zip"))
    assert first == second
