"""Token dispatchers: one backend a file, ``local`` is the oracle for the others."""
