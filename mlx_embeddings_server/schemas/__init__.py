"""What comes in over the wire."""
