"""What an input may be, and how it is read from a request."""
