"""Set-up shared by all tests."""

import vitrail.torchvision_ops  # noqa: F401  (before anything that imports torchvision)

# isort: split
import pytest
import torch


@pytest.fixture(autouse=True)
def _same_numbers_every_time() -> None:
    """A test draws the same random numbers whichever tests ran before it."""
    torch.manual_seed(0)
