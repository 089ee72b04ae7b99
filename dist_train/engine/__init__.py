"""How a step runs on many devices, and how it is saved, scheduled and measured."""
