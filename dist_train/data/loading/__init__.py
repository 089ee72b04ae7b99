"""Slots -> batches in host memory -> batches on the training device."""
