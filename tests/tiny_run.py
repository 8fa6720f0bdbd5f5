"""What the training tests share: a model of two layers, conversations of every kind, and runs in processes."""

import dataclasses
import json
import multiprocessing
import os
import random
import socket
from pathlib import Path

import torch
import torch._dynamo  # noqa: F401  fully_shard imports it on its first call; here it is imported once for all processes
from PIL import Image
from torch import Tensor
from torch.distributed.tensor import DTensor

from nanoeemllm.weights import folder as weights
from nanoeemllm.paths import make
from nanoeemllm.weights.initialize import initialize
from nanoeemllm.config import LlamaConfig, ModelConfig, VisionConfig
from nanoeemllm.data import Encoder, Mixture, Plan, load_batches
from nanoeemllm.model import EEMLLM
from nanoeemllm.weights.tokenizer import Tokenizer
from nanoeemllm.toy import make_tokenizer
from nanoeemllm.training.config import TrainConfig, freeze
from nanoeemllm.training.distributed import ProcessGroup, init_distributed, save_model, shard_model
from nanoeemllm.training.run_folder import RunFolder
from train import train

ALONE = ProcessGroup(0, 1, torch.device("cpu"))
WORDS = "red blue green cat star ring left right one two".split()


class Talks:
    """Conversations of one to three turns; a third have no picture, some have two, of any shape."""

    def __init__(self, length: int, broken: tuple[int, ...] = ()):
        self.length, self.broken = length, broken

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> dict:
        rng = random.Random(i)
        pictures = [Image.new("RGB", (rng.choice((16, 24, 32)), rng.choice((16, 32))), rng.choice(("red", "blue")))
                    for _ in range(rng.choice((0, 1, 1, 1, 2)))]
        turns = []
        for turn in range(rng.randint(1, 3)):
            question = "<image>\n" * (len(pictures) if turn == 0 else 0) + rng.choice(WORDS)
            turns += [{"from": "human", "value": question},
                      {"from": "gpt", "value": " ".join(rng.choices(WORDS, k=rng.randint(1, 5)))}]
        if i in self.broken:
            pictures = [*pictures, pictures]                             # more than the text names, and no picture
        return {"id": f"talk-{i}", "conversations": turns, "image": pictures}


def tiny_config(path: str = "eemllm", **settings) -> ModelConfig:
    llama = LlamaConfig(vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                        num_key_value_heads=2, head_dim=8, max_position_embeddings=256)
    vision = VisionConfig(hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, patch_size=8,
                          image_size=32, min_image_size=16, resize="native")
    return ModelConfig(llama, vision, make(path, **settings), "short")


def tiny_model(path: str = "eemllm", stage: str = "finetune", **settings) -> EEMLLM:
    torch.manual_seed(0)
    model = EEMLLM(tiny_config(path, **settings), tiny_tokenizer())
    initialize(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1:
                p.normal_(1.0 if "norm" in name else 0.0, 0.2)           # nothing is left at its beginning
            else:
                p.mul_(5)
    freeze(model, stage)
    return model


def tiny_tokenizer() -> Tokenizer:
    return Tokenizer(make_tokenizer("user assistant : two"))


def tiny_plan(length: int = 64, batch_size: int = 8, budget: float | None = None, **talks) -> Plan:
    return Plan(Mixture([Talks(length, **talks)]), batch_size, seed=0, budget=budget)


def encode(conversation: dict):
    config = tiny_config()
    return Encoder(tiny_tokenizer(), config.chat_template, config.vision, 200)(conversation)


def tiny_run(folder: Path, group: ProcessGroup = ALONE, stage: str = "finetune", path: str = "eemllm", steps: int = 8,
             loader=load_batches, plan: Plan | None = None, resume: bool = False, checkpoint_every: int = 2,
             max_bad: float = 0.01, model: EEMLLM | None = None, held_out: Plan | None = None) -> RunFolder:
    """A whole run in folder/run, and its model in folder/model."""
    model = model or tiny_model(path, stage)
    stored = shard_model(model, group)
    config = TrainConfig(stage, steps, 8, 1e-2, weight_decay=0.01)
    plan = plan or tiny_plan()
    run = RunFolder(folder / "run", {**dataclasses.asdict(config), "visual_path": {"name": path}}, group, resume)
    train(model, lambda first: loader(plan, encode, first, steps, group.rank, group.size), config, run, group,
          held_out and (lambda: load_batches(held_out, encode, 0, held_out.steps_per_epoch, group.rank, group.size)),
          checkpoint_every, max_bad)
    save_model(model, stored, group, folder / "model")
    return run


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def tensors(folder: Path) -> dict[str, Tensor]:
    return weights.load(folder, device="cpu").state_dict()


def gradients(model: EEMLLM) -> dict[str, Tensor]:
    whole = lambda x: x.full_tensor() if isinstance(x, DTensor) else x
    return {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


# ---- processes ----

# The server process imports PyTorch once, for all of them; where from, only this tells it.
os.environ["PYTHONPATH"] = os.pathsep.join((str(Path(__file__).parent), str(Path(__file__).parent.parent)))
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["tiny_run"])


def start(function, *arguments, rank: int = 0, size: int = 1, port: int = 0) -> multiprocessing.Process:
    """function(group, *arguments) in a process of its own."""
    process = _server.Process(target=_one, args=(rank, size, port, function, arguments))
    process.start()
    return process


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def in_processes(size: int, function, *arguments):
    """function(group, *arguments) in `size` processes that are one group."""
    port = free_port()
    processes = [start(function, *arguments, rank=rank, size=size, port=port) for rank in range(size)]
    for process in processes:
        process.join(600)
    assert [process.exitcode for process in processes] == [0] * size


def _one(rank: int, size: int, port: int, function, arguments):
    os.environ.update(OMP_NUM_THREADS="1", RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    with init_distributed("cpu") as group:
        function(group, *arguments)
