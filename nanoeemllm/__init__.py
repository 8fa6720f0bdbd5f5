"""EE-MLLM: a multimodal language model whose visual tokens are keys and values only. Start reading at config.py."""

from nanoeemllm.checkpoint import load
from nanoeemllm.config import IMAGE_TOKEN, PRESETS, ModelConfig, UserError
from nanoeemllm.model import EEMLLM

__all__ = ["EEMLLM", "IMAGE_TOKEN", "ModelConfig", "PRESETS", "UserError", "load"]
