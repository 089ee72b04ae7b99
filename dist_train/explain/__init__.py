"""Pictures of what in a clip a model's answer rests on."""
