"""The files of an artifact: a folder or a stored zip, checked byte by byte, replaced as a whole.

Writing is atomic: everything is written beside the target, flushed to the disk and then renamed,
so that a process killed at any point leaves the old artifact or the new one. Reading trusts
nothing: names are from a closed list, every length and hash is compared before a byte is used,
links are not followed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import stat
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

from fxpress.errors import ArtifactError

__all__ = ["SCHEMA", "canonical_json", "parse_json", "read", "staged"]

SCHEMA = 1
GRAPH, TENSORS, REPORT = "graph.json", "tensors.safetensors", "report.json"
PLAN, PLAN_TENSORS = "plan.json", "plan.safetensors"
_MANIFEST = "manifest.json"
_REQUIRED = {GRAPH, TENSORS, PLAN, REPORT}
_KNOWN = _REQUIRED | {PLAN_TENSORS}
_MANIFEST_LIMIT = 1 << 16
_CHUNK = 1 << 22
_SEAL = b"sha256:"
_DIGEST = 64
_AGAIN = "copy it again from its source, or save it again"


def canonical_json(value: Any) -> bytes:
    """The one text that is written for a value: what reads as the same value but differs is not."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


def parse_json(data: bytes, where: str, *, constants: bool = False) -> Any:
    """Parse strictly: UTF-8, no key twice, and NaN or Infinity only where `constants` allows it.

    Raises:
        ArtifactError: the bytes are no such text.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if len(set(keys)) < len(keys):
            raise ValueError(f"a key is there twice in {sorted(keys)[:8]}")
        return dict(pairs)

    def refuse(word: str) -> Any:
        raise ValueError(f"{word} is no JSON")

    try:
        constant = float if constants else refuse
        return json.loads(data.decode(), object_pairs_hook=once, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{where} is damaged: {error}; {_AGAIN}") from error


# Writing


@contextlib.contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A folder to write the files into; it takes the place of `path` when the block ends well.

    Args:
        path: the artifact; a stored zip where it ends in `.zip`, else a folder.

    Raises:
        ArtifactError: something that is no artifact is there already.
    """
    import fcntl

    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path)
    _check_replaceable(path)
    folder = path.with_name(f"{_partial_prefix(path)}{secrets.token_hex(4)}")
    folder.mkdir()
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released when the process ends, however it ends
        yield folder
        _seal(folder)
        _put(folder, path)
    finally:
        os.close(lock)
        shutil.rmtree(folder, ignore_errors=True)


def _is_zip(path: Path) -> bool:
    return path.suffix == ".zip"


def _partial_prefix(path: Path) -> str:
    return f".{path.name}.partial-"


def _replaced(path: Path) -> Path:
    """Where the old folder waits while the new one takes its place."""
    return path.with_name(f".{path.name}.replaced")


def _check_replaceable(path: Path) -> None:
    if not path.exists():
        return
    if _is_zip(path):
        ours = path.is_file()
    else:
        ours = path.is_dir() and ((path / _MANIFEST).is_file() or not any(path.iterdir()))
    if not ours:
        raise ArtifactError(f"{path} is there and is no fxpress artifact: save under another name")


def _sweep(path: Path) -> None:
    """Undo what killed processes left: an unfinished exchange, and folders that nobody writes."""
    waiting = _replaced(path)
    if waiting.exists() and not path.exists():
        waiting.rename(path)
    shutil.rmtree(waiting, ignore_errors=True)
    for left in path.parent.iterdir():
        if left.name.startswith(_partial_prefix(path)) and _is_abandoned(left):
            shutil.rmtree(left, ignore_errors=True)


def _is_abandoned(folder: Path) -> bool:
    """Whether no living process holds the lock of a partial folder."""
    import fcntl

    try:
        handle = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(handle)
    return True


def _seal(folder: Path) -> None:
    """Write the manifest of a folder's files and flush all of it to the disk."""
    entries = {}
    for file in sorted(folder.iterdir()):
        entries[file.name] = {"bytes": file.stat().st_size, "sha256": _file_digest(file)}
        _flush(file)
    manifest = folder / _MANIFEST
    manifest.write_bytes(_manifest(entries))
    _flush(manifest)
    _flush(folder)


def _manifest(entries: Mapping[str, Any]) -> bytes:
    content = {"schema": SCHEMA, "fxpress": metadata.version("fxpress"), "files": entries}
    return canonical_json(content | {"sha256": _content_digest(content)})


def _content_digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical_json(content)).hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _put(folder: Path, path: Path) -> None:
    """Exchange the finished folder, or a zip of it, for what is at `path`."""
    if _is_zip(path):
        _pack(folder, folder / path.name).replace(path)
    elif path.exists():
        path.rename(_replaced(path))
        folder.rename(path)
    else:
        folder.rename(path)
    _flush(path.parent)
    shutil.rmtree(_replaced(path), ignore_errors=True)


def _pack(folder: Path, packed: Path) -> Path:
    """A stored zip of a folder's files; its comment is the hash of every byte before the hash."""
    members = sorted(folder.iterdir())
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:
        for member in members:
            info = zipfile.ZipInfo(member.name)  # dated 1980: equal content, equal bytes
            info.external_attr = (stat.S_IFREG | 0o644) << 16
            info.file_size = member.stat().st_size
            with member.open("rb") as source, archive.open(info, "w") as target:
                shutil.copyfileobj(source, target, _CHUNK)
        archive.comment = _SEAL + b"0" * _DIGEST
    with packed.open("r+b") as file:
        digest = _digest_before_seal(file)
        file.seek(-_DIGEST, os.SEEK_END)
        file.write(digest)
    _flush(packed)
    return packed


def _digest_before_seal(file: BinaryIO) -> bytes:
    """Hash of a zip up to the hash in its comment, as hexadecimal digits."""
    digest, left = hashlib.sha256(), file.seek(0, os.SEEK_END) - _DIGEST
    file.seek(0)
    while left > 0 and (chunk := file.read(min(left, _CHUNK))):
        digest.update(chunk)
        left -= len(chunk)
    return digest.hexdigest().encode()


# Reading


def read(path: Path) -> dict[str, bytes]:
    """Every file of an artifact but the manifest, by name, with length and hash compared.

    Raises:
        ArtifactError: there is none, or anything about it is not as it was saved.
    """
    if not path.exists() and _replaced(path).is_dir():
        path = _replaced(path)  # a save was killed between its two renames
    if not path.exists():
        raise ArtifactError(f"{path} does not exist: save one with optimized.save(path)")
    try:
        return _read_folder(path) if path.is_dir() else _read_zip(path)
    except MemoryError as error:
        raise ArtifactError(f"{path} declares more than fits into memory") from error


def _read_folder(path: Path) -> dict[str, bytes]:
    # Opened once: files of two artifacts are not mixed where this one is replaced meanwhile.
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        names = os.listdir(folder)  # noqa: PTH208  (of the opened folder)
        return _verified(path, names, lambda *of: _read_member(path, folder, *of))
    finally:
        os.close(folder)


def _read_member(path: Path, folder: int, name: str, size: int | None) -> bytes:
    """A regular file of exactly `size` bytes (of at most the manifest's limit where None)."""

    def inside(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)

    try:
        file = open(name, "rb", opener=inside)  # noqa: SIM115  (Path.open has no opener)
    except OSError as error:
        raise ArtifactError(
            f"{path / name} cannot be opened ({error.strerror}): an artifact holds plain files only"
        ) from error
    with file:
        state = os.fstat(file.fileno())
        if not stat.S_ISREG(state.st_mode):
            raise ArtifactError(f"{path / name} is no plain file: an artifact holds nothing else")
        _check_size(f"{path / name}", state.st_size, size)
        return file.read(state.st_size)


def _check_size(where: str, actual: int, declared: int | None) -> None:
    if declared is None and actual > _MANIFEST_LIMIT:
        raise ArtifactError(f"{where} has {actual:,} bytes: that is no manifest")
    if declared is not None and actual != declared:
        raise ArtifactError(
            f"{where} has {actual:,} bytes where the manifest says {declared:,}: {_AGAIN}"
        )


def _read_zip(path: Path) -> dict[str, bytes]:
    with path.open("rb") as file:
        _check_zip_seal(path, file)
        try:
            with zipfile.ZipFile(file) as archive:
                return _read_members(path, archive)
        except (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError) as error:
            raise ArtifactError(f"{path} is damaged: {error}; {_AGAIN}") from error


def _check_zip_seal(path: Path, file: BinaryIO) -> None:
    size, length = file.seek(0, os.SEEK_END), len(_SEAL) + _DIGEST
    file.seek(max(0, size - length))
    seal = file.read()
    if len(seal) < length or seal != _SEAL + _digest_before_seal(file):
        raise ArtifactError(f"{path} is no artifact, or damaged: its hash differs; {_AGAIN}")


def _read_members(path: Path, archive: zipfile.ZipFile) -> dict[str, bytes]:
    members = {info.filename: info for info in archive.infolist()}
    for info in archive.infolist():
        kind = stat.S_IFMT(info.external_attr >> 16)
        plain = info.compress_type == zipfile.ZIP_STORED and info.compress_size == info.file_size
        if not plain or info.flag_bits & 0x1 or kind not in (0, stat.S_IFREG):
            raise ArtifactError(f"{path}: {info.filename!r} is not stored as a plain file")

    def member(name: str, size: int | None) -> bytes:
        _check_size(f"{path}: {name}", members[name].file_size, size)
        if members[name].file_size > path.stat().st_size:
            raise ArtifactError(f"{path}: {name} declares more bytes than the zip has")
        return archive.read(name)

    return _verified(path, archive.namelist(), member)


def _verified(
    path: Path, names: Iterable[str], member: Callable[[str, int | None], bytes]
) -> dict[str, bytes]:
    """Read the files that the manifest lists, which are all there are, and compare their hashes."""
    names = list(names)
    if _MANIFEST not in names:
        raise ArtifactError(f"{path} has no {_MANIFEST}: it is no fxpress artifact")
    entries = _parse_manifest(member(_MANIFEST, None), path)
    if len(set(names)) < len(names) or set(names) != {*entries, _MANIFEST}:
        raise ArtifactError(
            f"{path} holds {sorted(names)} where the manifest lists {sorted(entries)}: {_AGAIN}"
        )
    files = {}
    for name, (size, digest) in entries.items():
        files[name] = member(name, size)
        if len(files[name]) != size or hashlib.sha256(files[name]).hexdigest() != digest:
            raise ArtifactError(f"{path}: {name} is damaged: its hash differs; {_AGAIN}")
    return files


def _parse_manifest(data: bytes, path: Path) -> dict[str, tuple[int, str]]:
    """Length and hash by file name."""
    where = f"{path}: {_MANIFEST}"
    manifest = parse_json(data, where)
    if not isinstance(manifest, dict) or canonical_json(manifest) != data:
        raise ArtifactError(f"{where} is damaged: it is not as it was written; {_AGAIN}")
    digest = manifest.pop("sha256", None)
    if digest != _content_digest(manifest):
        raise ArtifactError(f"{where} is damaged: its hash differs; {_AGAIN}")
    if set(manifest) != {"schema", "fxpress", "files"}:
        raise ArtifactError(
            f"{where} has the fields {sorted(manifest)}: some are not of an artifact"
        )
    if manifest["schema"] != SCHEMA:
        raise ArtifactError(
            f"{where} has schema {manifest['schema']!r}, this fxpress reads {SCHEMA}: "
            f"use the version that wrote it ({manifest['fxpress']}), or save it again"
        )
    files = manifest["files"]
    if not isinstance(files, dict) or not _REQUIRED <= set(files) <= _KNOWN:
        listed = sorted(files) if isinstance(files, dict) else files
        raise ArtifactError(f"{where} lists {listed}: an artifact holds {sorted(_REQUIRED)}")
    return {name: _manifest_entry(entry, where) for name, entry in files.items()}


def _manifest_entry(entry: Any, where: str) -> tuple[int, str]:
    if not isinstance(entry, dict) or set(entry) != {"bytes", "sha256"}:
        raise ArtifactError(f"{where} has the entry {entry!r}: an entry is bytes and sha256")
    size, digest = entry["bytes"], entry["sha256"]
    if type(size) is not int or size < 0 or not isinstance(digest, str):
        raise ArtifactError(f"{where} has the entry {entry!r}: that is no length and hash")
    return size, digest
