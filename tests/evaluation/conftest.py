"""The model and the images of these tests."""

import pytest
from halves import make_defense, make_halves

from patchproof import PatchCleanser
from patchproof.datasets import ImageDataset


@pytest.fixture
def halves() -> ImageDataset:
    return make_halves()


@pytest.fixture
def defense() -> PatchCleanser:
    return make_defense()
