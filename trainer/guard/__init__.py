"""Guards: what keeps a bad step from being committed."""
