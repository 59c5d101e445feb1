"""The one exception type that users are meant to see."""


class GGLError(Exception):
    """A problem that the user can mend.

    The message is one line that names the argument, the value it had, what is allowed and the
    remedy. The command line prints it without a traceback and exits with code 2.
    """


class StorageError(GGLError):
    """The results could not be written; what was finished before is kept."""
