"""From settings and a store to snapshots: the loop, the step, recovery and validation."""
