"""Calibration files, and the samples that come with the package."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from numpy.typing import NDArray

from fxpress.errors import CalibrationError
from fxpress.testing import APPROXIMATES, assert_equivalent
from fxpress.zoo.samples import DATA, SAMPLE_RATE, read_folder, read_speech, read_texts

PROMPTS = DATA / "voice_prompts"
QUANTIZED = APPROXIMATES(2.0**-15)  # a 16-bit sample's rounding, against a tone of RMS 0.35


def write_tone(path: Path, rate: int, *, channels: int = 1, subtype: str = "PCM_16") -> Path:
    """A fifth of a second of 440 Hz: whole periods, so that resampling is exact."""
    samples = np.rint(tone(rate) * 2**15).astype(np.int16)
    soundfile.write(path, np.stack([samples] * channels, 1), rate, subtype=subtype)
    return path


def tone(rate: int) -> NDArray[np.float64]:
    return 0.5 * np.sin(2 * np.pi * 440 * np.arange(rate // 5) / rate)


def test_texts_by_line(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("Ein Satz über Öl.\n\n  \nAnother.\n", encoding="utf-8")
    assert read_texts(path) == ["Ein Satz über Öl.", "Another."]


def test_texts_by_object(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"text": "one\nline", "label": 3}, {"text": "ü"}]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    assert read_texts(path) == ["one\nline", "ü"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"text\n", "give a .txt file"),
        ("a.txt", b" \n\n", "holds no text"),
        ("a.txt", b"\xff\xfe", "UTF-8"),
        ("a.jsonl", b"{", "is not one object"),
        ("a.jsonl", b"[1]", "is not one object"),
        ("a.jsonl", b'{"txt": "a"}', "is not one object"),
        ("a.jsonl", b'{"text": 3}', "3 is no string"),
    ],
)
def test_texts_that_cannot_be_read(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError, match=message):
        read_texts(tmp_path / name)


def test_missing_texts(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"none\.txt cannot be read: No such file"):
        read_texts(tmp_path / "none.txt")


@pytest.mark.parametrize("rate", [8_000, 16_000, 48_000])
@pytest.mark.parametrize("name", ["tone.wav", "tone.flac"])
def test_speech_comes_at_16_khz(tmp_path: Path, rate: int, name: str) -> None:
    path = write_tone(tmp_path / name, rate, channels=2)
    assert_equivalent(
        lambda: torch.from_numpy(read_speech(path)),
        lambda: torch.from_numpy(tone(SAMPLE_RATE)).float(),
        (),
        exactness=QUANTIZED,
    )


def test_speech_that_cannot_be_read(tmp_path: Path) -> None:
    (noise := tmp_path / "noise.wav").write_bytes(b"no sound")
    with pytest.raises(CalibrationError, match="cannot be read as sound"):
        read_speech(noise)
    with pytest.raises(CalibrationError, match="kind PCM_24: give 16-bit"):
        read_speech(write_tone(tmp_path / "deep.wav", 8_000, subtype="PCM_24"))


def test_folder_of_speech(tmp_path: Path) -> None:
    for name, rate in (("b.wav", 8_000), ("a.FLAC", 16_000)):
        write_tone(tmp_path / name, rate)
    (tmp_path / "notes.txt").touch()
    assert len(read_folder(tmp_path)) == 2
    (first,) = read_folder(tmp_path, limit=1)
    assert np.array_equal(first, read_speech(tmp_path / "a.FLAC"))
    (empty := tmp_path / "empty").mkdir()
    with pytest.raises(CalibrationError, match=r"holds no \.wav or \.flac"):
        read_folder(empty)
    with pytest.raises(CalibrationError, match="is no folder"):
        read_folder(tmp_path / "b.wav")


def test_voice_prompts_are_what_they_say() -> None:
    parts = {part: sorted((PROMPTS / part).glob("*.flac")) for part in ("calibration", "heldout")}
    assert {part: len(paths) for part, paths in parts.items()} == {"calibration": 24, "heldout": 68}
    paths = parts["calibration"] + parts["heldout"]
    assert len({p.name for p in paths}) == len(paths)
    assert sum(p.stat().st_size for p in paths) <= 3_000_000
    for path in paths:
        info = soundfile.info(path)
        assert (info.samplerate, info.channels, info.subtype) == (8_000, 1, "PCM_16")
        assert 1.5 <= info.duration <= 12


def test_austen_is_split_by_novel() -> None:
    parts = [read_texts(DATA / "austen" / f"{part}.txt") for part in ("calibration", "heldout")]
    assert not set(parts[0]) & set(parts[1])
    assert all(len(text.split()) >= 5 for text in parts[0] + parts[1])
    assert parts[0][0].startswith("Emma Woodhouse")
    assert parts[1][0].startswith("Sir Walter Elliot")


@pytest.mark.parametrize("folder", ["austen", "fashion", "notices", "voice_prompts"])
def test_samples_name_author_licence_and_source(folder: str) -> None:
    text = (DATA / folder / "ATTRIBUTION.md").read_text(encoding="utf-8")
    assert all(f"- {item}" in text for item in ("Author:", "Licence:", "Source:", "Changes:"))
