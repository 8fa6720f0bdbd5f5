"""The whole model: pictures and text in; loss, logits or an answer out.

    picture -> patches -> vision -> projector -> visual tokens (V, C) -\
                                                                        decoder -> text rows (T, C) -> logits
    text    -> ids                            -> text tokens   (T, C) -/
"""

from dataclasses import dataclass
from typing import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanoeemllm.config import IMAGE_TOKEN, ModelConfig, UserError, VisualPathConfig
from nanoeemllm.decoder import Decoder, KVCache
from nanoeemllm.generation import Sampling, generate_steps
from nanoeemllm.image import prepare_image
from nanoeemllm.layout import Layout, build_layout
from nanoeemllm.prompt import Tokenizer, encode_text
from nanoeemllm.vision import VisionTransformer
from nanoeemllm.visual_path import Projector


@dataclass(frozen=True)
class Batch:
    """Whole samples, packed."""
    ids: Tensor               # (T,) int64, pictures taken out
    layout: Layout
    patches: Tensor           # (P, 3*p*p) float32, of all pictures
    learned_rows: Tensor      # (N,) int64: text rows whose next token is learned from
    targets: Tensor           # (N,) int64: those next tokens
    keys: list[str]           # which samples these are

    def to(self, device) -> "Batch":
        move = lambda t: t.to(device, non_blocking=True)
        return Batch(move(self.ids), self.layout.to(device), move(self.patches), move(self.learned_rows),
                     move(self.targets), self.keys)


def collate(samples: list) -> Batch:
    """data.Samples -> Batch.

    A text row learns the token that follows it in the merged sequence. A learned token right behind a picture would
    have to be said by a visual row; those make no queries, so it is not learned from. No template has such a token.
    """
    ids, layout = build_layout([s.ids for s in samples], [[grid for _, grid in s.images] for s in samples])
    learned = torch.tensor([flag for s in samples for i, flag in zip(s.ids, s.learned) if i != IMAGE_TOKEN])
    position = layout.text.position
    is_next = learned[1:] & (position[1:] == position[:-1] + 1)
    is_next[layout.text.start[1:].long() - 1] = False                      # the next sample's first token
    rows = is_next.nonzero().squeeze(1)
    patches = [patches for s in samples for patches, _ in s.images]
    return Batch(ids, layout, torch.cat(patches) if patches else torch.zeros(0, 0), rows, ids[rows + 1],
                 [s.key for s in samples])


class EEMLLM(nn.Module):
    """Vision encoder, projector and composite decoder. A config without vision makes a language model."""

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer | None = None):
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        if config.vision is not None:
            self.vision = VisionTransformer(config.vision)
            decoder = Decoder(config.llama, config.visual_path, config.vision.hidden_size)
            if not decoder.path.takes_features:
                self.projector = Projector(config.vision.hidden_size, config.llama.hidden_size)
        else:
            decoder = Decoder(config.llama, VisualPathConfig())          # text alone: no path has anything to do
        self.decoder = decoder

    @property
    def device(self) -> torch.device:
        return self.decoder.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.norm.weight.dtype

    def initialize(self):
        """Random weights, for training from nothing: normal with spread 0.02, biases 0; the matrices that write into
        the residual stream are scaled down by the square root of their number (GPT-2)."""
        for name, p in self.named_parameters():
            if name.endswith("bias") or name.endswith("class_embedding"):
                nn.init.zeros_(p)
            elif p.dim() > 1:
                layers = (self.config.vision if name.startswith("vision") else self.config.llama).num_hidden_layers
                writes = name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight", "fc2.weight"))
                nn.init.normal_(p, std=0.02 / (2 * layers) ** 0.5 if writes else 0.02)

    # ---- training ----

    def forward(self, batch: Batch) -> Tensor:
        """Sum of the cross entropies of the learned-from tokens, a float32 scalar; divide by their number outside,
        where the number in the whole global batch is known. Logits are made for those rows alone."""
        hidden = self.decoder(batch.ids, self.visual_tokens(batch.patches, batch.layout.grids), batch.layout)
        logits = self.decoder.logits(hidden[batch.learned_rows])
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), batch.targets,
                               reduction="sum")

    def visual_tokens(self, patches: Tensor, grids: list[tuple[int, int]]) -> Tensor:
        """(P, 3*p*p) -> (V, C), or the features as they are if the path projects them itself. Runs on no pictures too:
        under FSDP every rank must make the same calls."""
        if self.config.vision is None:
            return self.decoder.norm.weight.new_zeros(0, self.config.llama.hidden_size)
        patches = patches.reshape(-1, self.config.vision.patch_dim).to(self.dtype)
        features = self.vision(patches, grids)
        return features if self.decoder.path.takes_features else self.projector(features)

    # ---- answers ----

    def encode(self, prompt: str) -> list[int]:
        """Ids of a text as it stands, no chat template: BOS first, each `<image>` an IMAGE_TOKEN."""
        return encode_text(self.tokenizer, prompt, bos=True)

    @torch.inference_mode()
    def logits(self, ids: list[int], images: list = []) -> Tensor:
        """Scores of the next token (T, vocabulary), one row a text token, in order. images: PIL, one an IMAGE_TOKEN."""
        text_ids, layout, visual = self._read([ids], [images])
        return self.decoder.logits(self.decoder(text_ids, visual, layout))

    def generate(self, ids: list[int], images: list = [], max_new_tokens: int = 128, stop_ids: set[int] | None = None,
                 **sampling) -> Iterator[int]:
        """Yields new ids as they are made, up to a stop id (by default the tokenizer's) or max_new_tokens.

        sampling: temperature, top_k, top_p, min_p, repetition_penalty, seed (generation.Sampling).
        """
        stop_ids = self._stop_ids() if stop_ids is None else stop_ids
        for step in generate_steps(self, [ids], [images], max_new_tokens, Sampling(**sampling), stop_ids):
            for _, token in step:
                yield token

    def generate_batch(self, prompts: list[list[int]], images: list[list], max_new_tokens: int = 128,
                       stop_ids: set[int] | None = None, **sampling) -> list[list[int]]:
        """All prompts at once, unequal lengths and pictures: the same answers as one by one."""
        stop_ids = self._stop_ids() if stop_ids is None else stop_ids
        answers = [[] for _ in prompts]
        for step in generate_steps(self, prompts, images, max_new_tokens, Sampling(**sampling), stop_ids):
            for number, token in step:
                answers[number].append(token)
        return answers

    def prefill(self, prompts: list[list[int]], images: list[list], max_new_tokens: int) -> tuple[Tensor, KVCache]:
        """Reads the prompts: the hidden row of each one's last token (B, C), and the cache to decode from."""
        for number, ids in enumerate(prompts):
            if not ids or ids[-1] == IMAGE_TOKEN:
                what = "is empty" if not ids else "ends in <image>"
                raise UserError(f"prompt {number} {what}: the answer is said by the text token before it; add some text")
        text_ids, layout, visual = self._read(prompts, images)
        longest = int(torch.cat([layout.text.position, layout.visual.position]).max()) + 1
        if longest + max_new_tokens > self.config.llama.max_position_embeddings:
            raise UserError(f"a prompt of {longest} tokens and {max_new_tokens} new ones do not fit the model's context of "
                            f"{self.config.llama.max_position_embeddings}: shorten the prompt or ask for fewer")
        cache = KVCache(self.config.llama, layout, max_new_tokens, self.dtype)
        hidden = self.decoder(text_ids, visual, layout, cache)
        return hidden[(layout.text.start + layout.text.length - 1).long()], cache

    def _read(self, prompts: list[list[int]], images: list[list]) -> tuple[Tensor, Layout, Tensor]:
        if self.config.vision is None and any(images):
            raise UserError("this model has no image encoder: it reads text alone")
        prepared = [[prepare_image(image, self.config.vision) for image in group] for group in images]
        text_ids, layout = build_layout(prompts, [[grid for _, grid in group] for group in prepared])
        patches = [patches for group in prepared for patches, _ in group]
        patches = torch.cat(patches) if patches else torch.zeros(0)
        visual = self.visual_tokens(patches.to(self.device), layout.grids)
        return text_ids.to(self.device), layout.to(self.device), visual

    def _stop_ids(self) -> set[int]:
        return set(self.tokenizer.stop_ids(self.config.chat_template)) if self.tokenizer is not None else set()
