"""gptpipe: train a GPT from scratch, reproducibly."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptpipe.interface import Batches, Model, load_model, open_split, read_curves

__version__ = "0.1.0"
__all__ = ["Batches", "Model", "__version__", "load_model", "open_split", "read_curves"]


def __getattr__(name: str) -> Any:
    """Import the public interface when it is first used, because torch takes seconds."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("gptpipe.interface"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
