"""Process-wide defaults that have to be set before JAX is imported.

``ggl_jax/__init__.py`` imports this module first. Every default gives way to a value that the user
has already set.
"""

import os
import signal
import sys


def _leave(number, frame):
    os.write(2, b"ggl-jax: interrupted\n")
    os._exit(130)


# The command's own imports take seconds, in which Ctrl-C would show where in them it came.
if os.path.basename(sys.argv[0]).startswith("ggl-jax") or sys.orig_argv[1:3] == ["-m", "ggl_jax"]:
    signal.signal(signal.SIGINT, _leave)

# Many small eigendecompositions (one per CMA-ES restart) fight over OpenBLAS's threads:
# 10 ms against 116 to 1,670 ms a generation on two cores.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# On machines with very few cores XLA's default thread pool can starve when a vmapped branch full
# of Cholesky factorisations waits for itself; a larger pool does not.
if (os.cpu_count() or 1) < 8:
    os.environ.setdefault("NPROC", "8")

# A GPU allocator that takes most of the card at once hides what a run really needs, and keeps
# other processes out; the tool reports memory, so it should see the truth.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
