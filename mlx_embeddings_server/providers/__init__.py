"""Where vectors come from."""

LOCAL = "local"  # the name of what this process computes itself
