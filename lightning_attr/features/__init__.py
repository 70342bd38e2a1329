"""From a module at a snapshot to the rows of features that methods read."""
