"""One process among many: collectives, checks between ranks, hardware, signals, hangs."""
