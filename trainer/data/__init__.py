"""From the user's text to the batches of a step.

::

    sources ──documents──▶ tokenizer ──ids──▶ packing ──rows of seq_len + 1──▶ cache (memory-mapped Arrow)
                                                                                 │
       hub ──documents──▶ tokenizer ──ids──▶ packing (while training) ───────────┤
                                                                                 ▼
                                    loader: (seed, step) ──▶ this rank's micro-batches (Batch)

``prepare.prepare_data(config)`` does the upper line once and caches it; ``loader.build_loader`` gives the
steps and ``loader.valid_batches`` the held-out rows. This module stays empty of imports, so that code that
only needs ``Batch`` does not wait for the ``datasets`` package.
"""
