"""Many runs, one table."""

from vitrail.studies.sweep import (
    Outcome,
    Summary,
    grid,
    list_variant_sets,
    load_variants,
    run_sweep,
    summarize,
    write_sweep,
)

__all__ = [
    "Outcome",
    "Summary",
    "grid",
    "list_variant_sets",
    "load_variants",
    "run_sweep",
    "summarize",
    "write_sweep",
]
