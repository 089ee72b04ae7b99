"""What is wrong with a store's clips: faults, copies, shifts of brightness, leaks of labels."""
