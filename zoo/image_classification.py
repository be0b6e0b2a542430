"""The objective of image classification: which class is a small gray image of?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fxpress.errors import CalibrationError
from fxpress.zoo import corpora
from fxpress.zoo.classification import task_of_classes
from fxpress.zoo.objectives import Batch, Task, objective, sha256_of
from fxpress.zoo.samples import DATA

__all__ = ["augmented", "image_classification", "images", "nearest_mean"]

ROWS = 256  # images of a held-out batch
CALIBRATION_ROWS = 4
SHIFT = 2  # pixels


def _calibration(settings: Mapping[str, Any], path: Path | None, limit: int) -> list[Any]:
    """Batches of 4 images of a .npy file, (n, side, side) of uint8; without one, the zoo's own."""
    file = path or DATA / "fashion" / "calibration.npy"
    try:
        pixels = np.load(file, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise CalibrationError(f"{file} cannot be read: give a .npy file of images") from error
    if pixels.dtype != np.uint8 or pixels.ndim != 3:
        raise CalibrationError(
            f"{file} holds {pixels.dtype} of shape {pixels.shape}: give images as uint8 (n, h, w)"
        )
    chosen = torch.from_numpy(pixels[: limit * CALIBRATION_ROWS]).unsqueeze(1)
    return list(_standard(chosen, settings["mean"], settings["deviation"]).split(CALIBRATION_ROWS))


def images(path: Path | None = None, limit: int = 32) -> list[Any]:
    """Calibration of an untrained model: images with values from 0 to 1."""
    return _calibration({"mean": 0.0, "deviation": 1.0}, path, limit)


@objective("image-classification", reads_data=True, calibration=_calibration)
def image_classification(
    corpus: str, mean: float, deviation: float, augment: bool = False, data: Path | None = None
) -> Task:
    """Which class is an image of?

    Args:
        corpus: a name that `corpora.load` takes, whose rows have "image" (side x side bytes, by
            row) and "label" (0, 1, ...).
        mean: of pixels from 0 to 1; it is taken off.
        deviation: of pixels; they are divided by it.
        augment: train on images that are moved by 2 pixels at most, and half of them mirrored.
        data: a folder with train.parquet, valid.parquet and test.parquet, in place of the corpus.

    Raises:
        CorpusError: the data cannot be had or read.
    """
    known, valid, test = (_read(corpora.load(data or corpus, split)) for split in corpora.SPLITS)

    def draw(count: int, generator: torch.Generator) -> Batch:
        chosen = torch.randint(len(known[1]), (count,), generator=generator)
        drawn = known[0][chosen]
        seen = augmented(drawn, generator) if augment else drawn
        return (_standard(seen, mean, deviation),), known[1][chosen]

    def batches(pixels: Tensor, classes: Tensor) -> list[Batch]:
        inputs = _standard(pixels, mean, deviation).split(ROWS)
        return [((x,), y) for x, y in zip(inputs, classes.split(ROWS), strict=True)]

    return task_of_classes(
        draw,
        {"valid": batches(*valid), "test": batches(*test)},
        known[1],
        test[1],
        ("nearest class mean", nearest_mean(*known, test[0])),
        sha256_of(*known, *valid, *test),
    )


def _read(rows: Any) -> tuple[Tensor, Tensor]:
    """The images (n, 1, side, side) of uint8 and the classes (n,) of a split."""
    rows = rows[:]
    pixels = torch.frombuffer(bytearray(b"".join(rows["image"])), dtype=torch.uint8)
    side = math.isqrt(len(rows["image"][0]))
    return pixels.view(-1, 1, side, side), torch.tensor(rows["label"])


def _standard(pixels: Tensor, mean: float, deviation: float) -> Tensor:
    """Pixels of uint8 as floats around 0."""
    return (pixels / 255 - mean) / deviation


def augmented(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Images (B, 1, side, side), each moved by up to 2 pixels, every other one mirrored."""
    count, side = len(pixels), pixels.shape[-1]
    first = torch.randint(2 * SHIFT + 1, (2, count, 1), generator=generator)
    rows, columns = first + torch.arange(side)
    mirrored = torch.rand(count, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    padded = F.pad(pixels[:, 0], (SHIFT,) * 4)
    each = torch.arange(count)[:, None, None]
    return padded[each, rows[:, :, None], columns[:, None]].unsqueeze(1)


def nearest_mean(pixels: Tensor, classes: Tensor, others: Tensor) -> Tensor:
    """The classes of `others`: that whose mean image is the nearest."""
    kinds = int(classes.max()) + 1
    x, y = pixels.flatten(1).float(), others.flatten(1).float()
    sums = x.new_zeros(kinds, x.shape[1]).index_add(0, classes, x)
    means = sums / classes.bincount(minlength=kinds).unsqueeze(1)
    return torch.cdist(y, means).argmin(1)
