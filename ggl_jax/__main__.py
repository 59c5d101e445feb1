"""Entry point of the ``ggl-jax`` command and of ``python -m ggl_jax``."""

import _thread
import contextlib
import os
import signal
import sys
import threading


def _repeat_interrupt(unraisable) -> None:
    """Of an interrupt that came where Python cannot raise it, as in a finaliser: send it again."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        threading.Timer(0.05, _thread.interrupt_main).start()
    else:
        sys.__unraisablehook__(unraisable)


def main() -> None:
    """Run the command line and exit with its code.

    After Ctrl-C the process leaves at once: Python's own way out would tear down what threads of
    XLA still work with, and crash.
    """
    try:
        from ggl_jax.cli import run

        sys.unraisablehook = _repeat_interrupt
        signal.signal(signal.SIGINT, signal.default_int_handler)  # see ggl_jax._environment
        code = run()
    except KeyboardInterrupt:  # a second one, while the first was dealt with
        code = 130
    if code == 130:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
