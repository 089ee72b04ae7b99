"""The folder of a run: its settings, record, splits, data, model and snapshots."""
