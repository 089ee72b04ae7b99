"""``dist-train doctor``: is this machine, or are these machines together, fit for training?"""
