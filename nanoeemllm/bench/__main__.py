"""Operations, time and memory, measured. See README.md.

    python -m nanoeemllm.bench operations    of every visual path, and what the papers state
    python -m nanoeemllm.bench prefill       time to the first token, and of a second question
    python -m nanoeemllm.bench decode        whole answers of 2 to 256 tokens (the paper's Figure 4)
    python -m nanoeemllm.bench train         a training step: time, MFU, memory
    python -m nanoeemllm.bench kernel        the attention kernel beside PyTorch's best
    python -m nanoeemllm.bench experiments   which of the kernel's tiles suit a new GPU

Each has a --help of its own.
"""

import importlib
import sys

from nanoeemllm.border.command import Parser, run_command

FILES = {"operations": "operations", "flops": "operations", "prefill": "answers",
         "decode": "answers", "train": "train", "kernel": "kernel", "experiments": "experiments"}


def main(argv: list[str] | None = None):
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(__doc__, "python -m nanoeemllm.bench")
    parser.add_argument("command", choices=FILES, help="flops is operations")
    command = parser.parse_args(argv[:1]).command
    importlib.import_module(f"nanoeemllm.bench.{FILES[command]}").main(command, argv[1:])


if __name__ == "__main__":
    run_command(main)
