"""Fashion-MNIST (Xiao et al. 2017, arXiv 1708.07747): gray images of ten kinds of clothes."""

from __future__ import annotations

import gzip
from pathlib import Path

from fxpress.zoo.corpora import Row, Splits, corpus, split_of
from fxpress.zoo.debian import Apt, deb_members

__all__ = ["CLASSES", "SIDE", "fashion_mnist"]

PACKAGE = "dataset-fashion-mnist"
SIDE = 28  # pixels
CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
HEADS = {"images": 16, "labels": 8}  # bytes in front of the values, in files of the IDX format


@corpus("fashion-mnist", license="MIT", source=f"Debian package {PACKAGE}")
def fashion_mnist(downloads: Path) -> Splits:
    """Rows of "image" (784 bytes, by row) and "label" (0 to 9), 60,000 and 10,000 of them.

    The test set is the standard one; a tenth of the training images is set apart as valid, by the
    number of the image.
    """
    deb = Apt(downloads).download(PACKAGE)[PACKAGE]
    files = {Path(name).name: gzip.decompress(b) for name, b in deb_members(deb, r"ubyte\.gz$")}
    known = _rows(files, "train")
    of = [split_of(f"train/{i}", 0.1, 0) for i in range(len(known))]
    splits = {
        split: [row for row, own in zip(known, of, strict=True) if own == split]
        for split in ("train", "valid")
    }
    return {**splits, "test": _rows(files, "t10k")}


def _rows(files: dict[str, bytes], part: str) -> list[Row]:
    """The rows of two IDX files."""
    pixels = files[f"{part}-images-idx3-ubyte.gz"][HEADS["images"] :]
    labels = files[f"{part}-labels-idx1-ubyte.gz"][HEADS["labels"] :]
    size = SIDE * SIDE
    return [
        {"image": pixels[i * size : (i + 1) * size], "label": label}
        for i, label in enumerate(labels)
    ]
