"""The demo: generated tasks in four domains and a run that finds the ones that help a target."""
