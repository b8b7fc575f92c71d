"""What a worker verifies before it forks its pool and claims its first job."""


class StartupError(Exception):
    """The worker must not start; the text is one sentence with what was found and expected."""
