"""Schema of the columns, checks of requests, and collation into TorchRec batches."""
