"""Policies that act on a Mixture-of-Experts that collapses, where they are configured (docs/cure.md)."""
