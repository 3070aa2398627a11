"""``muster chaos``: train while faults strike, then compare with the run that nothing happened to."""
