"""The whole model: images and text in; loss, logits or an answer out.

    image -> patches -> vision -> projector -> visual tokens (V, C) -\\
                                                                      decoder -> text rows (T, C)
    text  -> ids -> embedding                -> text tokens   (T, C) -/             -> logits
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanoeemllm.cache import ImageKV, KVCache, encode_images, gather_images
from nanoeemllm.config import IMAGE_TOKEN, ModelConfig, UserError
from nanoeemllm.decoder import Decoder
from nanoeemllm.generate import Sampling, StopRule, generate_steps
from nanoeemllm.layout import Layout, build_layout
from nanoeemllm.prompt import encode_text
from nanoeemllm.vision import Projector, VisionTransformer


@dataclass(frozen=True)
class Batch:
    """Whole samples, packed."""
    ids: Tensor               # (T,) int64, images taken out
    layout: Layout
    patches: Tensor           # (P, 3*p*p) float32, of all images
    target_rows: Tensor       # (N,) int64: text rows whose next token is a target
    targets: Tensor           # (N,) int64: those next tokens
    keys: list[str]           # which samples these are

    def to(self, device) -> "Batch":
        moved = {name: getattr(self, name).to(device, non_blocking=True)
                 for name in ("ids", "patches", "target_rows", "targets")}
        return replace(self, layout=self.layout.to(device), **moved)


class EEMLLM(nn.Module):
    """Vision encoder, projector and composite decoder. Without vision: a language model."""

    def __init__(self, config: ModelConfig, tokenizer=None, source: str = ""):
        """tokenizer: weights.tokenizer.Tokenizer. source: the folder it was loaded from."""
        super().__init__()
        self.config, self.tokenizer, self.source = config, tokenizer, source
        self.spare_cache: KVCache | None = None                  # of the last answer
        path, width = config.visual_path, config.llama.hidden_size
        if config.vision is not None:
            self.vision = VisionTransformer(config.vision)
            if not path.takes_features:
                self.projector = Projector(config.vision.hidden_size, width)
            self.decoder = Decoder(config.llama, path, config.vision.hidden_size)
        else:
            self.decoder = Decoder(config.llama, ModelConfig(config.llama, None).visual_path)

    @property
    def device(self) -> torch.device:
        return self.decoder.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.norm.weight.dtype

    # ---- training ----

    def forward(self, batch: Batch) -> Tensor:
        """Sum of the cross entropies of the target tokens, a float32 scalar; divide by their number
        outside, where that of the whole global batch is known. Only target rows get logits."""
        visual = self.visual_tokens(batch.patches, batch.layout.grids)
        hidden = self.decoder(batch.ids, visual, batch.layout)
        logits = self.decoder.logits(hidden[batch.target_rows])
        exact = torch.promote_types(logits.dtype, torch.float32)
        return F.cross_entropy(logits.to(exact), batch.targets, reduction="sum")

    def visual_tokens(self, patches: Tensor, grids: list[tuple[int, int]]) -> Tensor:
        """(P, 3*p*p) -> (V, C), or the features as they are if the path projects them itself. Runs
        on no images too: under FSDP every rank must make the same calls."""
        if self.config.vision is None:
            return self.decoder.norm.weight.new_zeros(0, self.config.llama.hidden_size)
        patches = patches.reshape(-1, self.config.vision.patch_dim).to(self.dtype)
        features = self.vision(patches, grids)
        return features if self.decoder.path.takes_features else self.projector(features)

    # ---- answers ----

    def encode(self, prompt: str) -> list[int]:
        """Ids of a text as it stands, no chat template: BOS first, `<image>` an IMAGE_TOKEN."""
        if self.tokenizer is None:
            raise UserError("this model has no tokenizer: give ids, not text")
        if not isinstance(prompt, str):
            raise UserError(f"a prompt must be a string, not {prompt!r:.80}")
        return encode_text(self.tokenizer, prompt, bos=True)

    @torch.inference_mode()
    def logits(self, ids: list[int] | str, images: list = (),
               image_kv: list[ImageKV] | None = None) -> Tensor:
        """Scores of the next token (T, vocabulary), one row a text token, in order.

        images: PIL images, paths or open files, one an IMAGE_TOKEN; or what encode_images made of
        them, as image_kv. A string as ids is encoded."""
        hidden, _, _ = self._run([ids], [images], [image_kv or []])
        return self.decoder.logits(hidden)

    @torch.inference_mode()
    def encode_images(self, images: list) -> list[ImageKV]:
        """Encodes images once, for any number of prompts (`image_kv=`). Raises UserError under a
        visual path whose visual tokens attend to text."""
        patches, grids = self._patches([images])
        visual = self.visual_tokens(patches.to(self.device), grids[0])
        return encode_images(self.decoder, visual, grids[0])

    def generate(self, ids: list[int] | str, images: list = (), *args, image_kv=None,
                 **options) -> Iterator[int]:
        """Yields new ids as they are made; generate.stream_text makes text of them. ids, images and
        image_kv as in logits, options as in generate_batch."""
        for step in self._steps([ids], [images], *args, image_kv=[image_kv or []], **options):
            for _, token in step:
                yield token

    def generate_batch(self, prompts: list, images: list[list] | None = None, *args,
                       **options) -> list[list[int]]:
        """All prompts at once, of unequal lengths and images: the same answers as one by one, if
        none is drawn. Prompts with the same image_kv at the same positions share one copy of it.

        options: max_new_tokens (128), stop_ids (the tokenizer's), stop_strings, image_kv and the
        fields of generate.Sampling. A stop id is not part of the answer, the token that completes a
        stop string is."""
        answers = [[] for _ in prompts]
        for step in self._steps(prompts, images, *args, **options):
            for number, token in step:
                answers[number].append(token)
        return answers

    def _steps(self, prompts: list, images: list[list] | None, max_new_tokens: int = 128,
               stop_ids: set[int] | None = None, stop_strings: tuple[str, ...] = (),
               image_kv: list[list[ImageKV]] | None = None, **sampling):
        if stop_ids is None:
            known = self.tokenizer is not None
            stop_ids = self.tokenizer.stop_ids(self.config.chat_template) if known else ()
        stop = StopRule(frozenset(stop_ids), tuple(stop_strings), self.tokenizer)
        prompts = [self._ids(ids) for ids in prompts]
        return generate_steps(self, prompts, images, image_kv, max_new_tokens, Sampling(**sampling),
                              stop)

    @torch.inference_mode()
    def prefill(self, prompts: list[list[int]], images: list[list] | None, max_new_tokens: int,
                image_kv: list[list[ImageKV]] | None = None) -> tuple[Tensor, KVCache]:
        """The hidden row of each prompt's last token (B, C), and the cache to decode from."""
        for number, ids in enumerate(prompts):
            if not ids or ids[-1] == IMAGE_TOKEN:
                what = "ends in <image>" if ids else "is empty"
                raise UserError(f"prompt {number} {what}: the answer is predicted by the text "
                                "token before it; add some text")
        hidden, layout, cache = self._run(prompts, images, image_kv, max_new_tokens)
        return hidden[(layout.text.start + layout.text.length - 1).long()], cache

    def _run(self, prompts: list, images: list[list] | None, image_kv: list[list[ImageKV]] | None,
             max_new_tokens: int = 0) -> tuple[Tensor, Layout, KVCache | None]:
        """A pass over the prompts: hidden rows (T, C), their layout, and a cache if there are to be
        new tokens."""
        patches, grids = self._patches(images or [[] for _ in prompts])
        use_kv = image_kv is not None and any(image_kv)
        if use_kv:
            grids = [[image.grid for image in group] for group in image_kv]
        ids, layout = build_layout([self._ids(ids) for ids in prompts], grids)
        llama, longest = self.config.llama, int(layout.position.max()) + 1 if len(ids) else 0
        if len(ids) and not 0 <= ids.min() <= ids.max() < llama.vocab_size:
            raise UserError(f"token {ids.max()} is beyond the model's vocabulary of "
                            f"{llama.vocab_size}: its tokenizer has more words than its weights")
        if max_new_tokens and longest + max_new_tokens > llama.max_position_embeddings:
            raise UserError(f"a prompt of {longest} tokens and {max_new_tokens} new ones do not "
                            f"fit the model's context of {llama.max_position_embeddings}: shorten "
                            "the prompt or ask for fewer")
        visual = kv = None
        if use_kv:
            kv = gather_images(self.decoder, image_kv, layout)
            layout = kv.layout
        else:
            visual = self.visual_tokens(patches.to(self.device), layout.grids)
            layout = layout.to(self.device)
        cache = self._cache_for(layout, max_new_tokens) if max_new_tokens else None
        return self.decoder(ids.to(self.device), visual, layout, cache, kv), layout, cache

    def _ids(self, ids: list[int] | str) -> list[int]:
        if isinstance(ids, str):
            return self.encode(ids)
        if not isinstance(ids, (list, tuple)) or not all(type(i) is int for i in ids):
            raise UserError(f"ids must be a string or a list of whole numbers, not {ids!r:.80}")
        return list(ids)

    def _patches(self, images: list[list]) -> tuple[Tensor, list[list[tuple[int, int]]]]:
        """Of all images (P, 3*p*p), on the CPU, and every sample's grids."""
        from nanoeemllm.data.images import load_image, prepare_image
        if any(not isinstance(group, (list, tuple)) for group in images):
            raise UserError("images must be a list: PIL images, paths or open files")
        if self.config.vision is None and any(images):
            raise UserError("this model has no image encoder: it reads text alone")
        prepared = [[prepare_image(load_image(image), self.config.vision) for image in group]
                    for group in images]
        patches = [patches for group in prepared for patches, _ in group]
        grids = [[grid for _, grid in group] for group in prepared]
        return torch.cat(patches) if patches else torch.zeros(0), grids

    def _cache_for(self, layout: Layout, max_new_tokens: int) -> KVCache:
        """The cache of an earlier answer where it fits: with it come its CUDA graphs."""
        cache, self.spare_cache = self.spare_cache, None
        if cache is not None and cache.fits(layout, max_new_tokens, self.dtype):
            cache.begin(layout)
            return cache
        del cache                       # its memory goes before the new one's is asked for
        return KVCache(self.config.llama, layout, max_new_tokens, self.dtype,
                       static=self.device.type == "cuda")
