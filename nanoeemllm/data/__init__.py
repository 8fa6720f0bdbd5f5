"""From conversations in files to packed micro-batches. See README.md."""

from nanoeemllm.data.conversations import ConversationFile
from nanoeemllm.data.images import patch_grid
from nanoeemllm.data.loading import Loader, Packed
from nanoeemllm.data.packing import (Mixture, Plan, Sample, collate, count_tokens, encode_sample,
                                     open_mixture)

__all__ = ["ConversationFile", "Loader", "Mixture", "Packed", "Plan", "Sample", "collate",
           "count_tokens", "encode_sample", "open_mixture", "patch_grid"]
