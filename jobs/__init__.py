"""The command line and Ray: composition only.

Waiting threads of torch sleep instead of spinning (read when torch is loaded, so set before anything else): on two
busy cores a training step took 7.1 s with spinning threads and 0.4 s with sleeping ones (infra/LOG.md).
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
