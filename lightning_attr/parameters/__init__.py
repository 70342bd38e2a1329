"""Which parameters are attributed, their weights as files, and what an optimizer knows of them."""
