"""Runs whose every figure is computed a second time: in float64, in one process, from the plan and the data alone."""
