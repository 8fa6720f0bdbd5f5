"""What the benchmarks measure: one model under many visual paths, one question about random pictures, one clock."""

import contextlib
import dataclasses
import time

import torch
from torch import Tensor

from nanoeemllm import visual_path
from nanoeemllm.config import ModelConfig
from nanoeemllm.flops import SIDES, prompt
from nanoeemllm.generation import Sampling, Stop, generate_steps
from nanoeemllm.layout import Layout
from nanoeemllm.model import EEMLLM
from nanoeemllm.pictures import KeptKeys, gather, read, see
from nanoeemllm.visual_path import CompositePath

OLD = "llava-2024"                                # llava with scores_in_memory


class System:
    """A model under one visual path. All systems of a run have their common weights in common."""

    def __init__(self, name: str, config: ModelConfig, pool: dict[str, Tensor], args):
        self.name, self.old = name, name == OLD
        positions = max(config.llama.max_position_embeddings, 2 ** 15)         # random prompts may be long
        self.config = dataclasses.replace(config, llama=dataclasses.replace(
            config.llama, max_position_embeddings=positions))
        with torch.device("meta"):
            self.model = EEMLLM(self.config).to(args.dtype)
        state = self.model.state_dict()
        for key, p in state.items():
            if key not in pool:
                random = torch.randn if p.dim() > 1 else torch.ones
                pool[key] = random(p.shape, dtype=args.dtype, device=args.device) * (0.02 if p.dim() > 1 else 1)
        self.model.load_state_dict({key: pool[key] for key in state}, assign=True)
        self.model.requires_grad_(False)

    @property
    def keeps(self) -> bool:
        return isinstance(self.model.decoder.path, CompositePath)

    def attention(self):
        return scores_in_memory() if self.old else contextlib.nullcontext()


@contextlib.contextmanager
def scores_in_memory():
    """Attention over one sample as LLaVA had it in 2024: the whole matrix of scores, a mask, a softmax in float32."""
    def attention(q, k_visual, v_visual, k_text, v_text, query, visual, text, scale=None):
        group = q.shape[1] // k_text.shape[1]
        k, v = (torch.cat(kind).repeat_interleave(group, 1).transpose(0, 1) for kind in ((k_visual, k_text), (v_visual, v_text)))
        sees = []
        for run in (visual, text):
            row = torch.arange(len(run.position), device=q.device)
            sees.append((row >= run.start) & (row < run.start + run.length) & (run.position <= query.position[:, None]))
        scores = q.transpose(0, 1) @ k.transpose(1, 2) * q.shape[-1] ** -0.5                        # (H, queries, keys)
        scores = scores.masked_fill(~torch.cat(sees, dim=1), torch.finfo(q.dtype).min)
        return (scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v).transpose(0, 1)

    now, visual_path.composite_attention = visual_path.composite_attention, attention
    try:
        yield
    finally:
        visual_path.composite_attention = now


class Clock:
    """Times between marks, in ms: of the GPU's own events, or of the clock where there is no GPU."""

    def __init__(self, device: str):
        self.gpu, self.marks = device.startswith("cuda"), []

    def mark(self, name: str = ""):
        if self.gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        self.marks.append((name, event if self.gpu else time.perf_counter()))

    def spans(self) -> dict[str, float]:
        if self.gpu:
            torch.cuda.synchronize()
        between = lambda a, b: a.elapsed_time(b) if self.gpu else 1000 * (b - a)
        return {name: between(self.marks[i][1], mark) for i, (name, mark) in enumerate(self.marks[1:])}


class Question:
    """One random prompt with pictures. It takes the model's place in generate_steps."""

    def __init__(self, system: System, visual: int, images: int, args):
        self.model, self.args = system.model, args
        self.config, self.decoder, self.spare_cache = system.config, system.model.decoder, None
        side = SIDES[visual]
        self.layout: Layout = prompt(args.text, side, images)
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(3, self.config.llama.vocab_size, (args.text,), generator=generator).to(args.device)
        self.patches = torch.randn(images * visual, self.config.vision.patch_dim, generator=generator).to(args.device)
        self.on_device = self.layout.to(args.device)
        self.kept: KeptKeys | None = None

    def see(self):
        visual = self.model.visual_tokens(self.patches, self.layout.grids)
        self.kept = gather(self.decoder, [see(self.decoder, visual, self.layout.grids)], self.layout)

    def prefill(self, prompts=None, images=None, max_new_tokens: int = 1, pictures=None, clock: Clock | None = None):
        mark = clock.mark if clock else (lambda name="": None)
        mark()
        layout = self.on_device if self.kept is None else self.kept.layout
        if self.kept is None:
            visual = self.model.visual_tokens(self.patches, self.layout.grids)
            mark("vision")
        cache = self.model._cache_for(layout, max_new_tokens)
        if self.kept is None:
            hidden = self.decoder(self.ids, visual, layout, cache)
        else:
            hidden = read(self.decoder, self.ids, self.kept, cache)
        mark("prefill")
        return hidden[-1:], cache

    @torch.inference_mode()
    def first_token(self) -> dict[str, float]:
        """ms: vision (unless the pictures are kept), prefill, first token; and all of it."""
        clock = Clock(self.args.device)
        hidden, cache = self.prefill(clock=clock)
        self.decoder.logits(hidden).argmax(-1)
        clock.mark("first token")
        spans = clock.spans()
        self.model.spare_cache = cache
        return spans | {"total": sum(spans.values())}

    def answer(self, tokens: int) -> list[float]:
        """Seconds until each token could be read."""
        _synchronize(self.args.device)
        begin, times = time.perf_counter(), []
        for _ in generate_steps(self, [[3]], None, None, tokens, Sampling(), Stop()):
            times.append(time.perf_counter() - begin)
        self.model.spare_cache = self.spare_cache
        return times


def _synchronize(device: str):
    if device.startswith("cuda"):
        torch.cuda.synchronize()
