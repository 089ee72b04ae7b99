"""``dist-train doctor``: check one machine, or all machines of a launch, before training."""
