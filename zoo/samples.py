"""Calibration files read into texts or speech, and the samples that come with the package.

- `data/voice_prompts`: English telephone prompts (CC-BY-SA-3.0).
- `data/austen`: paragraphs of Jane Austen's novels (public domain).
- `data/sentences`: sentences and their translations (Apache-2.0).
- `data/pronunciations`: words and their phonemes (CMU's dictionary, BSD).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fxpress.errors import CalibrationError

__all__ = ["DATA", "SAMPLE_RATE", "read_folder", "read_rows", "read_speech", "read_texts"]

DATA = Path(__file__).parent / "data"
SAMPLE_RATE = 16_000


def read_texts(path: Path) -> list[str]:
    """The texts of a file: .txt has one paragraph a line, .jsonl an object with "text" a line.

    Raises:
        CalibrationError: the file is missing, of another kind, malformed, or holds no text.
    """
    if path.suffix not in (".txt", ".jsonl"):
        raise CalibrationError(f"{path}: give a .txt file (one paragraph a line) or a .jsonl file")
    if path.suffix == ".jsonl":
        return [row["text"] for row in _rows(path, ("text",), 'a string "text"', "text")]
    texts = _lines(path)
    if not texts:
        raise CalibrationError(f"{path} holds no text")
    return texts


def read_rows(path: Path, fields: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a .jsonl file, an object with these strings a line; what else it has is left out.

    Raises:
        CalibrationError: the file is missing, of another kind, malformed, or holds no row.
    """
    wanted = " and ".join(f'"{field}"' for field in fields)
    if path.suffix != ".jsonl":
        raise CalibrationError(f"{path}: give a .jsonl file with {wanted} a line")
    return _rows(path, fields, wanted, "row")


def _rows(path: Path, fields: Sequence[str], wanted: str, what: str) -> list[dict[str, str]]:
    """The rows of a .jsonl file; `wanted` and `what` are a row's content and its name in errors."""
    try:
        lines = [json.loads(x) for x in _lines(path)]
        rows = [{field: _string(line, field) for field in fields} for line in lines]
    except (ValueError, KeyError, TypeError) as error:
        raise CalibrationError(
            f"{path} is not one object with {wanted} a line, in UTF-8: {error}"
        ) from error
    if not rows:
        raise CalibrationError(f"{path} holds no {what}")
    return rows


def _lines(path: Path) -> list[str]:
    """The lines of a file that are not blank."""
    try:
        return [x for x in path.read_text(encoding="utf-8").splitlines() if x.strip()]
    except OSError as error:
        raise CalibrationError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path} is not text in UTF-8: {error}") from error


def _string(row: dict[str, Any], field: str) -> str:
    if not isinstance(row[field], str):
        raise TypeError(f"{row[field]!r:.40} is no string")
    return str(row[field])


def read_speech(path: Path) -> NDArray[np.float32]:
    """The samples of a 16-bit .wav or .flac file: mono, at 16 kHz, between -1 and 1.

    Raises:
        CalibrationError: the file cannot be read, or has other than 16-bit samples.
    """
    import soundfile

    try:
        subtype = soundfile.info(path).subtype
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except soundfile.SoundFileError as error:
        raise CalibrationError(f"{path} cannot be read as sound: {error}") from error
    if subtype != "PCM_16":
        raise CalibrationError(f"{path} has samples of kind {subtype}: give 16-bit sound (PCM_16)")
    return _resample(samples.mean(axis=1), rate)


def _resample(samples: NDArray[np.float32], rate: int) -> NDArray[np.float32]:
    """To 16 kHz, by cutting or padding the spectrum: exact for band-limited sound."""
    length = len(samples) * SAMPLE_RATE // rate
    if rate == SAMPLE_RATE or not length:
        return samples
    spectrum = np.fft.rfft(samples)[: length // 2 + 1]
    spectrum = np.pad(spectrum, (0, length // 2 + 1 - len(spectrum)))
    return (np.fft.irfft(spectrum, length) * (length / len(samples))).astype(np.float32)


def read_folder(folder: Path, limit: int | None = None) -> list[NDArray[np.float32]]:
    """The first `limit` .wav and .flac files of a folder, by name, as `read_speech` gives them.

    Raises:
        CalibrationError: there is none, or one cannot be read.
    """
    if not folder.is_dir():
        raise CalibrationError(f"{folder} is no folder: give one with .wav or .flac files")
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in (".wav", ".flac"))
    if not paths:
        raise CalibrationError(f"{folder} holds no .wav or .flac file")
    return [read_speech(p) for p in paths[:limit]]
