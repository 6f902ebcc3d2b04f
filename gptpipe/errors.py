"""What can go wrong, each kind with the exit code that a stage ends with.

A message is one line: what is wrong, where, and how to mend it.
"""

import signal


class GptpipeError(Exception):
    """Anything that a user can mend; never raised itself."""

    exit_code = 1


class ConfigError(GptpipeError):
    """params.yaml, or a combination of its values, cannot be used."""

    exit_code = 2


class InputError(GptpipeError):
    """The user's data cannot be read, or there is too little of it."""

    exit_code = 3


class IntegrityError(GptpipeError):
    """An artefact is not what its manifest says it is."""

    exit_code = 4


class ResourceError(GptpipeError):
    """Disk, memory, a lock or another outside resource is not to be had."""

    exit_code = 5


class NumericError(GptpipeError):
    """A loss or a gradient is not finite."""

    exit_code = 6
    red_flag = "not_finite"  # its name in the record


class SpikeError(NumericError):
    """A loss or a gradient is far above the last ones."""

    red_flag = "spike"


class Interrupted(GptpipeError):
    """A signal asked the run to stop; what could be saved is saved."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(f"{signal.Signals(signum).name}: {message}")
        self.exit_code = 128 + signum


def first_line(error: BaseException) -> str:
    """What a library's error says, fit for a message of one line."""
    return (str(error).splitlines() or [type(error).__name__])[0]
