"""Interaction logs into TorchRec batches: readers, presets, splits, a synthetic world."""
