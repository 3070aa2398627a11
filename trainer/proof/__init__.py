"""The parity certificate: a user's own config, shrunk, held against one process that knows nothing of it.

shrink.py      the config that is run, by stated rules
corpus.py      text and target masks that every party reads alike
record.py      a callback that writes down what the layout's ranks compute
reference.py   one process, plain PyTorch: no engine, no dispatcher but the local one, no sharding
compare.py     both, side by side: the certificate and what a deviation points at
"""
