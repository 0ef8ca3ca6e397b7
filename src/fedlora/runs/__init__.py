"""A configuration becomes a run folder: run, resume, compare, sweep, plan."""
