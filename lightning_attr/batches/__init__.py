"""What a batch is made of: nested tensors, one row per sample, or samples apart."""
