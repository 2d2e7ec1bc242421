"""Set-up shared by all tests."""

import vitrail.torchvision_ops  # noqa: F401  (before anything that imports torchvision)
