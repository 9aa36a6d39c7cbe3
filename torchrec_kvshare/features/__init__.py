"""Which columns there are, requests checked, rows gathered into TorchRec batches."""
