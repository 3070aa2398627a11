"""Models from and to other ecosystems."""
