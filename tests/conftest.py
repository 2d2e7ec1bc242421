"""Set-up shared by all tests."""

import vitrail.torchvision_ops  # noqa: F401  (before anything that imports torchvision)

# isort: split
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _same_numbers_every_time() -> None:
    """A test draws the same random numbers whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Decoded images, and the key of the seals, are made here and not in the user's home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VITRAIL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
