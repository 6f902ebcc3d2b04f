"""What one server accepts. Larger requests get an error that names the limit."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of requests, and of the work of one model."""

    max_tokens: int = 4096  # new tokens of a sequence
    seconds: float = 300.0  # from the request to its last token
    sequences: int = 16  # continued at once
    queue: int = 128  # sequences that wait
    body_bytes: int = 1 << 20
    body_seconds: float = 30.0  # to receive a request
    grace_seconds: float = 5.0  # for running requests, when the server ends


SEQUENCES_PER_REQUEST = 64  # prompts times n
MAX_ALTERNATIVES = 20
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1000
