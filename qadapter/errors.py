"""The one exception a user is meant to read."""


class QAdapterError(Exception):
    """Something the user gave cannot work.

    The message is one to three sentences: what was given, what was expected, what to do. Command lines print it
    without a traceback and exit with a code that is not 0.
    """
