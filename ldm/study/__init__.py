"""Floor 6: the study: sweeps, their analysis, reports."""
