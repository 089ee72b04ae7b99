"""From snapshots to predictions, metrics, a report and an exported model."""
