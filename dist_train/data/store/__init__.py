"""Clip -> shard and index; reading, checking and repairing of a finished store."""
