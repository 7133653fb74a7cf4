"""Waiting items become full batches, and one thread a model turns batches into vectors."""
