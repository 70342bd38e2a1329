"""One run of ``attribute``: its arguments, the Trainer that it borrows, the predict step, the scores."""
