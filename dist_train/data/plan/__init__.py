"""(seed, epoch, step) -> the global batch -> each rank's slots. Numpy alone, no I/O."""
