"""What the operating system allows: processes, CPUs, locks, shared memory; and its errors."""
