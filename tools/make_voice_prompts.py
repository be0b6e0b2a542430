"""Choose the voice prompts of the zoo from Debian's asterisk-core-sounds-en-wav.

They are written as FLAC, with the same samples.

Usage, on a Debian system:

    apt-get download asterisk-core-sounds-en-wav
    python tools/make_voice_prompts.py asterisk-core-sounds-en-wav_*.deb zoo/data/voice_prompts

The choice is deterministic: prompts of 1.5 to 12 seconds, in a shuffled order of their names with a
fixed seed; the first 24 are for calibration, and as many others as fit are held out for judging.
"""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess
import tempfile
from pathlib import Path

import soundfile

SEED = 0
CALIBRATION = 24
MAX_BYTES = 2_900_000
MIN_SECONDS, MAX_SECONDS = 1.5, 12.0
VOICE = "usr/share/asterisk/sounds/en_US_f_Allison"


def candidates(sounds: Path) -> list[Path]:
    """The prompts of suitable length, in the shuffled order; recorded silence is left out."""
    paths = sorted(p for p in sounds.rglob("*.wav") if "silence" not in p.parts)
    paths = [p for p in paths if MIN_SECONDS <= soundfile.info(p).duration <= MAX_SECONDS]
    random.Random(SEED).shuffle(paths)
    return paths


def to_flac(wav: Path, flac: Path) -> int:
    """Write the same samples losslessly; return the size in bytes."""
    samples, rate = soundfile.read(wav, dtype="int16")
    soundfile.write(flac, samples, rate, format="FLAC", subtype="PCM_16", compression_level=1.0)
    return flac.stat().st_size


def choose(sounds: Path, out: Path) -> None:
    """Fill ``out/calibration`` and ``out/heldout`` until the next prompt would not fit."""
    size = 0
    for i, wav in enumerate(candidates(sounds)):
        folder = out / ("calibration" if i < CALIBRATION else "heldout")
        folder.mkdir(parents=True, exist_ok=True)
        flac = folder / ("-".join(wav.relative_to(sounds).with_suffix("").parts) + ".flac")
        size += to_flac(wav, flac)
        if size > MAX_BYTES:
            flac.unlink()
            return


def main() -> None:
    """Unpack the Debian package and choose; existing prompts are replaced."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("deb", type=Path, help="the Debian package")
    parser.add_argument("out", type=Path, help="folder to fill")
    args = parser.parse_args()
    for part in ("calibration", "heldout"):
        shutil.rmtree(args.out / part, ignore_errors=True)
    with tempfile.TemporaryDirectory() as unpacked:
        subprocess.run(["dpkg-deb", "-x", args.deb, unpacked], check=True)
        choose(Path(unpacked, VOICE), args.out)


if __name__ == "__main__":
    main()
