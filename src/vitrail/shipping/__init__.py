"""Trained models made ready for where they will run."""

from vitrail.shipping.export import Exported, write_export

__all__ = ["Exported", "write_export"]
