"""Fine-tuning on handwritten digits: pre-training, the optimum, fine-tuning, evaluation and a report."""

from typing import TYPE_CHECKING, Any

from .config import Config as Config

if TYPE_CHECKING:
    from .experiment import run as run
else:  # the command reads its options before it loads JAX

    def __getattr__(name: str) -> Any:
        if name != "run":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from .experiment import run

        return run
