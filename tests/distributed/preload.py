"""What the server of a pool imports for its workers, some of it what torch imports only when it is used."""

import torch._inductor
import torch.distributed.fsdp  # noqa: F401

import parallel.engines.native  # noqa: F401
import tests.distributed.cases  # noqa: F401
