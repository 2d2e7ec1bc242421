"""Many runs, one table: side by side, swept over values, or as a study with questions and answers."""

from vitrail.studies.compare import Comparison, Row, compare, with_latency, write_comparison
from vitrail.studies.page import write_study
from vitrail.studies.plan import Study, plan_study
from vitrail.studies.runs import FinishedRun, read_run
from vitrail.studies.study import Answer, StudyResult, outline, run_study
from vitrail.studies.sweep import grid, list_variant_sets, load_variants, rank, run_sweep, write_sweep

__all__ = [
    "Answer",
    "Comparison",
    "FinishedRun",
    "Row",
    "Study",
    "StudyResult",
    "compare",
    "grid",
    "list_variant_sets",
    "load_variants",
    "outline",
    "plan_study",
    "rank",
    "read_run",
    "run_study",
    "run_sweep",
    "with_latency",
    "write_comparison",
    "write_study",
    "write_sweep",
]
