"""Vectors that were computed before, kept in memory and, for several servers, in Redis or on disk."""
