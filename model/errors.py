"""The error that a bad file causes, apart from ValueError for a bad argument: they differ in exit code."""


class DataError(ValueError):
    """A file or record that cannot be used: says which, what is wrong, and what to try."""
