"""What ends a command though its input was right."""


class Failure(RuntimeError):
    """Something outside failed: a disk, a store, a package, another process. One line says what."""
