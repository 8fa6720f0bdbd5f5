"""From conversations in files to packed micro-batches. See README.md."""

from nanoeemllm.data.conversations import ConversationFile
from nanoeemllm.data.images import patch_grid
from nanoeemllm.data.loading import Packed, load_batches
from nanoeemllm.data.packing import Encoder, Mixture, Plan, Sample, collate, open_mixture

__all__ = ["ConversationFile", "Encoder", "Mixture", "Packed", "Plan", "Sample", "collate",
           "load_batches", "open_mixture", "patch_grid"]
