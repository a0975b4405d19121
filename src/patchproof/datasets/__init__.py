"""Labelled images: embedded digits, public data sets, image folders and Parquet folders."""

from patchproof.datasets.images import CorruptImageError, ImageDataset
from patchproof.datasets.sources import load_dataset

__all__ = ["CorruptImageError", "ImageDataset", "load_dataset"]
