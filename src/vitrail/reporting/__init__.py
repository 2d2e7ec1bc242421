"""The report of a run, as one file that opens anywhere."""
