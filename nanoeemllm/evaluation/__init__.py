"""Benchmarks and attention maps (see README.md)."""

from nanoeemllm.evaluation.metrics import GROUPS, summarize
from nanoeemllm.evaluation.questions import evaluate_rows, table

__all__ = ["GROUPS", "evaluate_rows", "summarize", "table"]
