"""EE-MLLM: a multimodal language model whose visual tokens are keys and values only."""

from nanoeemllm.config import IMAGE_TOKEN, ModelConfig, UserError
from nanoeemllm.model import EEMLLM

__all__ = ["EEMLLM", "IMAGE_TOKEN", "ModelConfig", "PRESETS", "UserError", "load"]


def __getattr__(name: str):
    """What lies outside of the lesson, when it is asked for."""
    if name == "load":
        from nanoeemllm.weights.folder import load
        return load
    if name == "PRESETS":
        from nanoeemllm.config import PRESETS
        return PRESETS
    raise AttributeError(f"module {__name__} has no attribute {name}")
