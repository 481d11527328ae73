"""minipaged: a small, complete PagedAttention engine that one can see through."""

from typing import TYPE_CHECKING, Any

from minipaged.config import SamplingParams
from minipaged.errors import InputError

if TYPE_CHECKING:
    from minipaged.api import LLM

__all__ = ["LLM", "InputError", "SamplingParams"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """LLM is imported when it is asked for: `import minipaged` must not cost the import of torch."""
    if name == "LLM":
        from minipaged.api import LLM

        return LLM
    raise AttributeError(f"module 'minipaged' has no attribute {name!r}")
