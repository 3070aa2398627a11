"""The decoder-only transformer and its parts."""
