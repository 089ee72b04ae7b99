"""Sharded checkpoints: their format on disk, how they are written, and which are kept."""
