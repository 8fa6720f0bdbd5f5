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
from nanoeemllm.generation import Sampling, Stop, generate_steps
from nanoeemllm.image import prepare_image
from nanoeemllm.layout import Layout, build_layout
from nanoeemllm.pictures import Picture, gather, read, see
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
        self.spare_cache: KVCache | None = None                        # of the last answer, see _cache_for
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
        """Random weights, for training from nothing: normal with spread 0.02, biases and gates 0, norms 1; the matrices
        that write into the residual stream are scaled down by the square root of their number (GPT-2)."""
        for name, p in self.named_parameters():
            if name.endswith(("bias", "class_embedding", "_gate")):
                nn.init.zeros_(p)
            elif p.dim() > 1:
                layers = (self.config.vision if name.startswith("vision") else self.config.llama).num_hidden_layers
                writes = name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight", "fc2.weight"))
                nn.init.normal_(p, std=0.02 / (2 * layers) ** 0.5 if writes else 0.02)
            else:
                nn.init.ones_(p)

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
    def logits(self, ids: list[int], images: list = [], pictures: list[Picture] | None = None) -> Tensor:
        """Scores of the next token (T, vocabulary), one row a text token, in order. images: PIL, or pictures that `see`
        has seen, one an IMAGE_TOKEN."""
        hidden, _, _ = self._read([ids], [images], [pictures] if pictures else None)
        return self.decoder.logits(hidden)

    @torch.inference_mode()
    def see(self, images: list) -> list[Picture]:
        """Reads pictures once, for any number of prompts (`pictures=` below). Raises UserError under a visual path
        whose visual tokens look at text."""
        patches, grids = self._patches([images])
        return see(self.decoder, self.visual_tokens(patches.to(self.device), grids[0]), grids[0])

    def generate(self, ids: list[int], images: list = [], max_new_tokens: int = 128, stop_ids: set[int] | None = None,
                 stop_strings: tuple[str, ...] = (), pictures: list[Picture] | None = None, **sampling) -> Iterator[int]:
        """Yields new ids as they are made, up to a stop id (by default the tokenizer's), the token that completes a
        stop string, or max_new_tokens. (generation.stream_text makes text of them.)

        images, or pictures that `see` has seen: one an IMAGE_TOKEN.
        sampling: temperature, top_k, top_p, min_p, repetition_penalty, seed (generation.Sampling).
        """
        for step in generate_steps(self, [ids], [images], None if pictures is None else [pictures], max_new_tokens,
                                   Sampling(**sampling), self._stop(stop_ids, stop_strings)):
            for _, token in step:
                yield token

    def generate_batch(self, prompts: list[list[int]], images: list[list] | None = None, max_new_tokens: int = 128,
                       stop_ids: set[int] | None = None, stop_strings: tuple[str, ...] = (),
                       pictures: list[list[Picture]] | None = None, **sampling) -> list[list[int]]:
        """All prompts at once, unequal lengths and pictures: the same answers as one by one, if none is drawn. Prompts with the same
        pictures at the same places share one copy of them."""
        answers = [[] for _ in prompts]
        for step in generate_steps(self, prompts, images, pictures, max_new_tokens, Sampling(**sampling),
                                   self._stop(stop_ids, stop_strings)):
            for number, token in step:
                answers[number].append(token)
        return answers

    @torch.inference_mode()
    def prefill(self, prompts: list[list[int]], images: list[list] | None, max_new_tokens: int,
                pictures: list[list[Picture]] | None = None) -> tuple[Tensor, KVCache]:
        """Reads the prompts: the hidden row of each one's last token (B, C), and the cache to decode from."""
        for number, ids in enumerate(prompts):
            if not ids or ids[-1] == IMAGE_TOKEN:
                what = "is empty" if not ids else "ends in <image>"
                raise UserError(f"prompt {number} {what}: the answer is said by the text token before it; add some text")
        hidden, layout, cache = self._read(prompts, images, pictures, max_new_tokens)
        return hidden[(layout.text.start + layout.text.length - 1).long()], cache

    def _read(self, prompts: list[list[int]], images: list[list] | None, pictures: list[list[Picture]] | None,
              max_new_tokens: int = 0) -> tuple[Tensor, Layout, KVCache | None]:
        """A pass over the prompts: hidden rows (T, C), their layout, and a cache if there are to be new tokens."""
        seen_before = pictures is not None and any(pictures)
        if seen_before:
            grids = [[picture.grid for picture in group] for group in pictures]
        else:
            patches, grids = self._patches(images or [[] for _ in prompts])
        ids, layout = build_layout(prompts, grids)
        if len(ids) and ids.max() >= self.config.llama.vocab_size:
            raise UserError(f"token {ids.max()} is beyond the model's vocabulary of {self.config.llama.vocab_size}: its "
                            "tokenizer has more words than its weights")
        if max_new_tokens:
            self._check_context(layout, max_new_tokens)

        if seen_before:
            kept = gather(self.decoder, pictures, layout)
            layout = kept.layout
        else:
            visual = self.visual_tokens(patches.to(self.device), layout.grids)
            layout = layout.to(self.device)
        cache = self._cache_for(layout, max_new_tokens) if max_new_tokens else None
        ids = ids.to(self.device)
        hidden = read(self.decoder, ids, kept, cache) if seen_before else self.decoder(ids, visual, layout, cache)
        return hidden, layout, cache

    def _patches(self, images: list[list]) -> tuple[Tensor, list[list[tuple[int, int]]]]:
        """Of all pictures (P, 3*p*p), on the CPU, and every sample's grids."""
        if self.config.vision is None and any(images):
            raise UserError("this model has no image encoder: it reads text alone")
        prepared = [[prepare_image(image, self.config.vision) for image in group] for group in images]
        patches = [patches for group in prepared for patches, _ in group]
        return torch.cat(patches) if patches else torch.zeros(0), [[grid for _, grid in group] for group in prepared]

    def _check_context(self, layout: Layout, max_new_tokens: int):
        longest = int(torch.cat([layout.text.position, layout.visual.position]).max()) + 1
        if longest + max_new_tokens > self.config.llama.max_position_embeddings:
            raise UserError(f"a prompt of {longest} tokens and {max_new_tokens} new ones do not fit the model's context of "
                            f"{self.config.llama.max_position_embeddings}: shorten the prompt or ask for fewer")

    def _cache_for(self, layout: Layout, max_new_tokens: int) -> KVCache:
        """The cache of an earlier answer where it fits: with it come the CUDA graphs recorded on it."""
        cache, self.spare_cache = self.spare_cache, None
        if cache is not None and cache.fits(layout, max_new_tokens, self.dtype):
            cache.begin(layout)
            return cache
        del cache
        return KVCache(self.config.llama, layout, max_new_tokens, self.dtype, static=self.device.type == "cuda")

    def _stop(self, ids: set[int] | None, strings: tuple[str, ...]) -> Stop:
        if ids is None:
            ids = self.tokenizer.stop_ids(self.config.chat_template) if self.tokenizer is not None else ()
        return Stop(frozenset(ids), tuple(strings), self.tokenizer)
