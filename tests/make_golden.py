"""Makes tests/golden: small random models of every supported source, as transformers saves them, and what it computes.

    pip install torch==2.13.0 transformers==5.24.0 sentencepiece==0.2.3 safetensors pillow jinja2
    PYTHONPATH=. python tests/make_golden.py

The tests only read the result; this is the one file that imports transformers and sentencepiece.

    sources/NAME/          a folder as the hub has it: config.json, weights, tokenizer
    expected.safetensors   NAME.ids, NAME.logits, NAME.greedy; NAME.SIZE of features, every STRIDE-th patch
    tokens.json            texts and their ids by SentencePiece; conversations, ids and masks by LLaVA's preprocessing
    templates.json         chat templates as published and as we export them, and what Jinja makes of PROBE
    exported.json          what convert_weights.py --to-hf made of sources when transformers loaded it: NAME.ids,
                           export.NAME.logits in expected.safetensors are transformers' answers
"""

import hashlib
import json
import re
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

GOLDEN = Path(__file__).parent / "golden"
SIZES = {"square": (400, 400), "wide": (1500, 420), "tall": (90, 500), "tiny": (5, 3)}
STRIDE = 17
NEW = 64


def picture(width: int, height: int) -> Image.Image:
    """Smooth waves and some noise, the same on every machine."""
    y, x = np.mgrid[:height, :width]
    noise = np.random.default_rng(width * 10007 + height).integers(0, 40, (height, width, 3))
    waves = np.stack([np.sin(x / 11 + c) + np.cos(y / (7 + c)) for c in range(3)], -1)
    return Image.fromarray((waves * 50 + 110 + noise).astype(np.uint8))


def text_ids(seed: int, length: int, vocab: int) -> list[int]:
    return [1, *np.random.default_rng(seed).integers(3, vocab, length - 1).tolist()]


TEXTS = ["", " ", "  ", "a", " a", "a ", "Hello world", "the cat  is   red", "    four", "\n", "\t", "a\nb\r\n c\td",
         " \n ", "caf\u00e9 na\u00efve \u00c5", "e\u0301", "\u65e5\u672c\u8a9e\u306e\u6587",
         "\U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467 x", "<s>", "</s>", "x</s>y <unk>", "<s></s>", "<0x0A>",
         "a\0b", "\x01\x1b\x7f", "\u00a0\u3000\u200b", "\u2581a\u2581", "12345.678", "aaaaaaa", "ababababab",
         "\ufb01 \u00bd", "USER: what? ASSISTANT: it is.", "<sep>", "a<sep>b <sep> </s><sep>", "\U0001d4d0\ud7ff\ue000",
         "def f(x):\n    return x  # no"]
CONVERSATIONS = {
    "one turn": [("human", "What is it?"), ("gpt", "It is a cat.")],
    "image": [("human", "<image>\nWhat is in the picture?"), ("gpt", "A red dog and a cat.")],
    "image last": [("human", "What is in the picture?\n<image>"), ("gpt", "the cat")],
    "many turns": [("human", "<image>\nwhat?"), ("gpt", "A cat."), ("human", "Is it red?"), ("gpt", "It is not red."),
                   ("human", "caf\u00e9 \U0001f600?"), ("gpt", "the answer is 42.\nIt is.")],
    "text only, many turns": [("human", "the question"), ("gpt", "the answer"), ("human", "a  b"), ("gpt", " spaces ")],
}
SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. "
          "The assistant gives helpful, detailed, and polite answers to the user's questions.")


def corpus() -> list[str]:
    rng = np.random.default_rng(0)
    words = ("the a cat dog red blue is it not what in picture USER ASSISTANT question answer caf\u00e9 na\u00efve 42 "
             "and aa aaa abab helpful polite curious assistant artificial intelligence chat between user gives "
             "detailed Hello world").split()
    ends = [".", "?", ":", " ", ""]
    return [" ".join(rng.choice(words, rng.integers(1, 9))) + str(rng.choice(ends)) for _ in range(3000)]


def main():
    shutil.rmtree(GOLDEN, ignore_errors=True)
    (GOLDEN / "sources").mkdir(parents=True)
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    expected = {}
    tokens = make_tokenizers()
    for make in (make_llamas, make_towers, make_llava, make_exports):
        make(expected)
    make_templates()
    from safetensors.torch import save_file
    save_file({name: x.contiguous() for name, x in expected.items()}, GOLDEN / "expected.safetensors")
    (GOLDEN / "tokens.json").write_text(json.dumps(tokens, indent=0))
    print(f"{sum(f.stat().st_size for f in GOLDEN.rglob('*') if f.is_file()) / 1e6:.2f} MB")


# ---- tokenizers ----


def make_tokenizers() -> dict:
    import sentencepiece
    result = {"texts": TEXTS, "sentencepiece": {}, "conversations": {}}
    (GOLDEN / "corpus.txt").write_text("\n".join(corpus()))
    for name, settings in {"vicuna": {}, "no_prefix": dict(add_dummy_prefix=False),
                           "user_defined": dict(user_defined_symbols=["<sep>", "cat dog"]),
                           "trimmed": dict(remove_extra_whitespaces=True)}.items():
        folder = source(name) if name == "vicuna" else GOLDEN
        path = folder / ("tokenizer" if name == "vicuna" else name)
        sentencepiece.SentencePieceTrainer.train(
            input=str(GOLDEN / "corpus.txt"), model_prefix=str(path), vocab_size=400, model_type="bpe",
            byte_fallback=True, normalization_rule_name="identity", split_digits=True,
            allow_whitespace_only_pieces=True, minloglevel=2, **({"remove_extra_whitespaces": False} | settings))
        path.with_suffix(".vocab").unlink()
        model = sentencepiece.SentencePieceProcessor(model_file=str(path.with_suffix(".model")))
        result["sentencepiece"][name] = [model.encode(text) for text in TEXTS]
    (GOLDEN / "corpus.txt").unlink()
    for legacy in (True, False):
        result["conversations"][f"legacy={legacy}"] = {
            name: llava_v1(turns, legacy) for name, turns in CONVERSATIONS.items()}
    return result


def hf_llama_tokenizer(legacy: bool):
    import transformers
    return transformers.LlamaTokenizer.from_pretrained(source("vicuna"), legacy=legacy, use_default_system_prompt=False)


def llava_v1(turns: list, legacy: bool) -> dict:
    """LLaVA's preprocess_multimodal, tokenizer_image_token and preprocess_v1, told again in few lines."""
    tokenizer = hf_llama_tokenizer(legacy)

    def encode(text: str) -> list[int]:  # each stretch between images is tokenized with a BOS, which then goes
        ids = [1]
        for i, chunk in enumerate(text.split("<image>")):
            ids += ([-200] if i else []) + tokenizer(chunk, add_special_tokens=False).input_ids
        return ids

    prompt = SYSTEM + " "
    for i, (role, text) in enumerate(turns):
        if "<image>" in text:
            text = ("<image>\n" + text.replace("<image>", "").strip()).strip()
        prompt += f"USER: {text} " if i % 2 == 0 else f"ASSISTANT: {text}</s>"
    ids = encode(prompt)
    learned, at = [False] * len(ids), 1
    for i, part in enumerate(prompt.split("</s>")[:-1]):
        size, asked = len(encode(part)), len(encode(part.split(" ASSISTANT: ")[0] + " ASSISTANT: ")) - 2
        if i and not legacy:  # the piece behind </s> has no dummy space, which LLaVA makes up for with 1
            shorter = len(encode(part)) - 1 - len(tokenizer("</s>" + part, add_special_tokens=False).input_ids[1:])
            size, asked = size - shorter, asked - shorter
        learned[at + asked:at + size] = [True] * (size - asked)
        at += size
    assert at == len(ids), "tokenization mismatch"
    return {"ids": ids, "learned": "".join(".#"[x] for x in learned)}


def byte_level(folder: Path, specials: list[str], vocab: int):
    """A tokenizer.json as Llama-3's and SmolLM2's: BPE over bytes."""
    import tokenizers
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.train_from_iterator(corpus(), tokenizers.trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=specials, show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)


# ---- models ----


def source(name: str) -> Path:
    folder = GOLDEN / "sources" / name
    folder.mkdir(exist_ok=True)
    return folder


def randomize(model, dtype=torch.float32):
    """Weights large enough that a wrong detail shows in every logit, rounded to dtype."""
    for name, p in model.named_parameters():
        p.copy_((torch.randn_like(p) * 0.15 + (1.0 if "norm" in name and name.endswith("weight") else 0.0)).to(dtype))
    return model.eval()


def edit(folder: Path, changes: dict, remove=(), file: str = "config.json"):
    """config.json as the hub has it, which leaves things out and puts them in other places."""
    path = folder / file
    config = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in (config | changes).items() if k not in remove}, indent=1))


def greedy(step, ids: list[int]) -> torch.Tensor:
    """The most likely next id, NEW times over, without a cache. step: ids -> logits (T, vocabulary)."""
    ids = list(ids)
    for _ in range(NEW):
        ids.append(int(step(ids)[-1].argmax()))
    return torch.tensor(ids[-NEW:])


def make_llamas(expected: dict):
    import transformers
    small = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                 max_position_embeddings=512)
    llama3 = dict(rope_type="llama3", rope_theta=5000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                  original_max_position_embeddings=64)
    cases = {  # multi-head; grouped, explicit head width, Llama-3's RoPE; tied
        "vicuna": dict(vocab_size=400, rms_norm_eps=1e-5),
        "llama3": dict(vocab_size=320, num_key_value_heads=2, head_dim=16, rope_parameters=llama3),
        "smollm2": dict(vocab_size=330, num_key_value_heads=1, tie_word_embeddings=True,
                        rope_parameters=dict(rope_type="default", rope_theta=100000.0)),
    }
    for name, settings in cases.items():
        dtype = torch.float32 if name == "llama3" else torch.float16
        model = randomize(transformers.LlamaForCausalLM(transformers.LlamaConfig(**small, **settings)), dtype)
        ids = text_ids(1, 30, settings["vocab_size"])
        step = lambda ids: model(torch.tensor([ids])).logits[0]
        expected |= {f"{name}.ids": torch.tensor(ids), f"{name}.logits": step(ids), f"{name}.greedy": greedy(step, ids)}
        model.to(dtype).save_pretrained(source(name), max_shard_size="20KB" if name == "smollm2" else "5GB")
    published_vicuna(source("vicuna"))
    edit(source("llama3"), {"rope_theta": llama3.pop("rope_theta"), "rope_scaling": llama3, "bos_token_id": 0,
                             "eos_token_id": 1}, ("rope_parameters",))
    edit(source("llama3"), {"bos_token_id": 0, "eos_token_id": [1, 4]}, file="generation_config.json")
    byte_level(source("llama3"), ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
                                  "<|eot_id|>"], 320)
    byte_level(source("smollm2"), ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], 330)


def published_vicuna(folder: Path):
    """Two .bin shards with RoPE's constants among them, half of config.json left out."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for i in range(2):
        tensors[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    names, weight_map = sorted(tensors), {}
    for i, part in enumerate((names[:12], names[12:])):
        file = f"pytorch_model-{i + 1:05d}-of-00002.bin"
        torch.save({name: tensors[name].clone() for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    edit(folder, {}, remove=("rope_parameters", "head_dim", "attention_bias", "mlp_bias", "tie_word_embeddings",
                             "num_key_value_heads"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"legacy": False, "tokenizer_class": "LlamaTokenizer"}))


def make_towers(expected: dict):
    import transformers as hf
    tower = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, patch_size=14)
    text = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=16,
                bos_token_id=0, eos_token_id=1)
    siglip, clip = tower | dict(image_size=104), tower | dict(image_size=98, num_hidden_layers=3)
    idefics2 = tower | dict(image_size=980)
    cases = {
        "siglip": hf.SiglipModel(hf.SiglipConfig(text_config=text | {"projection_size": 16}, vision_config=siglip)),
        "siglip_vision": hf.SiglipVisionModel(hf.SiglipVisionConfig(**siglip)),
        "clip": hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=clip, projection_dim=8)),
        "clip_vision": hf.CLIPVisionModel(hf.CLIPVisionConfig(**clip)),
        "idefics2": hf.Idefics2ForConditionalGeneration(hf.Idefics2Config(
            text_config=text | dict(model_type="mistral", num_key_value_heads=1), vision_config=idefics2,
            perceiver_config=dict(hidden_size=8, resampler_n_latents=2, resampler_depth=1, resampler_n_heads=1,
                                  resampler_head_dim=8, num_key_value_heads=1))),
    }
    for name, model in cases.items():
        randomize(model, torch.float16)
        for size, (width, height) in SIZES.items():
            expected[f"{name}.{size}"] = tower_features(hf, name, model, picture(width, height))[::STRIDE]
        model.half().save_pretrained(source(name))
    keep = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size", "image_size")
    for name in ("siglip", "clip", "idefics2"):  # the hub's files give only what is not the default
        config = json.loads((source(name) / "config.json").read_text())["vision_config"]
        edit(source(name), {"vision_config": {key: config[key] for key in keep}})
    tensors = load_file(source("clip") / "model.safetensors")
    (source("clip") / "model.safetensors").unlink()
    tensors["vision_model.embeddings.position_ids"] = torch.arange(50)[None]
    torch.save(tensors, source("clip") / "pytorch_model.bin")


def tower_features(hf, name: str, model, image: Image.Image) -> torch.Tensor:
    """Last features for SigLIP, those before the last layer and without the class token for CLIP."""
    if name.startswith("clip"):
        pixels = clip_pixels(hf, image, 98)
        vision = model.vision_model if name == "clip" else model
        return vision(pixels, output_hidden_states=True).hidden_states[-2][0, 1:]
    if name == "idefics2":
        from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil
        pixels = Idefics2ImageProcessorPil(image_mean=[0.5] * 3, image_std=[0.5] * 3)(image, return_tensors="pt")
        pixels = pixels["pixel_values"][0]
        height, width = (side // 14 for side in pixels.shape[-2:])
        mask = torch.ones(1, height, width, dtype=torch.bool)
        return model.model.vision_model(pixels, patch_attention_mask=mask).last_hidden_state[0]
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
    pixels = SiglipImageProcessorPil(size={"height": 104, "width": 104})(image, return_tensors="pt")["pixel_values"]
    return (model.vision_model if name == "siglip" else model)(pixels).last_hidden_state[0]


def clip_pixels(hf, image: Image.Image, size: int) -> torch.Tensor:
    """Padded to a square with the mean colour, as the authors of LLaVA-1.5 did."""
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
    square = {"height": size, "width": size}
    processor = LlavaImageProcessorPil(do_pad=True, size=square, crop_size=square)
    return processor(image, return_tensors="pt")["pixel_values"]


def make_llava(expected: dict):
    import transformers as hf
    text = hf.LlamaConfig(vocab_size=448, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
                          num_attention_heads=4, max_position_embeddings=512, rms_norm_eps=1e-5)
    tower = hf.CLIPVisionConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
                                image_size=56, patch_size=14, projection_dim=8)
    model = randomize(hf.LlavaForConditionalGeneration(hf.LlavaConfig(
        text_config=text, vision_config=tower, image_token_index=400, image_seq_length=16)), torch.float16)
    for name, places in (("one", [3]), ("three", [1, 9, 16])):
        ids = text_ids(2, 24, 400)
        for at in places:
            ids[at] = -200
        images = torch.cat([clip_pixels(hf, picture(60 + 50 * i, 90), 56) for i in range(len(places))])
        expected[f"llava.{name}.ids"] = torch.tensor(ids)
        for path, step in (("llava", lambda ids: llava_step(model, ids, images)),
                           ("eemllm", lambda ids: eemllm_step(model, ids, images))):
            expected[f"llava.{name}.{path}.logits"] = step(ids)
            expected[f"llava.{name}.{path}.greedy"] = greedy(step, ids)
    model.half().save_pretrained(source("llava"))
    tokenizer = hf_llama_tokenizer(True)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"], "pad_token": "<pad>"})
    tokenizer.save_pretrained(source("llava"))
    for file in source("llava").iterdir():
        if not re.match(r"model\.safetensors|config\.json|tokenizer\.json", file.name):
            file.unlink()


def merged(ids: list[int]) -> tuple[list[int], torch.Tensor]:
    """<image> -> 16 image tokens (400), and which rows are text."""
    flat = [x for i in ids for x in ([400] * 16 if i == -200 else [i])]
    return flat, torch.tensor(flat) != 400


def llava_step(model, ids: list[int], images: torch.Tensor) -> torch.Tensor:
    flat, is_text = merged(ids)
    return model(input_ids=torch.tensor([flat]), pixel_values=images).logits[0][is_text]


def eemllm_step(model, ids: list[int], images: torch.Tensor) -> torch.Tensor:
    """The same Llama over the merged sequence: causal rows for text, identity rows for visual tokens."""
    flat, is_text = merged(ids)
    llama, lm_head = model.model.language_model, model.lm_head
    x = llama.embed_tokens(torch.tensor(flat))
    features = model.model.vision_tower(images, output_hidden_states=True).hidden_states[-2][:, 1:]
    x[~is_text] = model.model.multi_modal_projector(features).flatten(0, 1)
    n = len(flat)
    allowed = torch.where(is_text[:, None], torch.ones(n, n).tril().bool(), torch.eye(n).bool())
    mask = torch.zeros(1, 1, n, n).masked_fill(~allowed, torch.finfo(torch.float32).min)
    hidden = llama(inputs_embeds=x[None], attention_mask=mask, position_ids=torch.arange(n)[None]).last_hidden_state
    return lm_head(hidden[0])[is_text]


# ---- out again ----

EXPORTS = {"vicuna": dict(llm="vicuna"), "llama3": dict(llm="llama3"), "smollm2": dict(llm="smollm2"),
           "llava": dict(llava="llava"), "siglip": dict(llm="smollm2", vision="siglip"),
           "clip": dict(llm="vicuna", vision="clip_vision")}


def export_source(name: str, folder: Path) -> tuple[Path, Path]:
    """Converts a row of EXPORTS and writes it out. Returns the model folder and the exported one."""
    from nanoeemllm.weights.export import export
    from nanoeemllm.weights.folder import save
    from nanoeemllm.weights.published import read
    sources = {kind: GOLDEN / "sources" / place for kind, place in EXPORTS[name].items()}
    save(*read(**sources), folder / name)
    export(folder / name, folder / f"{name}-hf")
    return folder / name, folder / f"{name}-hf"


def exported_files(folder: Path) -> dict:
    """What transformers reads: the configurations, and the weights' checksum. (The tokenizer's words
    are compared by check_words.)"""
    files = {path.name: json.loads(path.read_text())
             for path in folder.glob("*.json") if path.name != "tokenizer.json"}
    weights = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        for name, x in sorted(load_file(path).items()):
            weights.update(f"{name} {x.dtype} {tuple(x.shape)} ".encode())
            weights.update(x.contiguous().view(torch.uint8).numpy().tobytes())
    return files | {"weights": weights.hexdigest()}


def make_exports(expected: dict):
    import transformers as hf
    from nanoeemllm.weights.folder import read_config, read_tokenizer
    exported = {}
    with tempfile.TemporaryDirectory() as temporary:
        for name in EXPORTS:
            model, folder = export_source(name, Path(temporary))
            exported[name] = exported_files(folder)
            config = read_config(model)
            kind = hf.LlavaForConditionalGeneration if config.vision else hf.LlamaForCausalLM
            theirs, info = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
            assert not any(info.values()), info
            ids = text_ids(4, 20, 300)
            ids[3:8:4] = [-200, -200] if config.vision else ids[3:8:4]
            expected |= {f"export.{name}.ids": torch.tensor(ids),
                         f"export.{name}.logits": export_step(hf, theirs, folder, ids, config)}
            check_words(hf, folder, read_tokenizer(model, config), config)
    (GOLDEN / "exported.json").write_text(json.dumps(exported, indent=0, sort_keys=True))


def export_step(hf, model, folder: Path, ids: list[int], config) -> torch.Tensor:
    if config.vision is None:
        return model.eval()(torch.tensor([ids])).logits[0]
    processor = hf.AutoImageProcessor.from_pretrained(folder, backend="pil")
    images = [picture(60 + 50 * i, 90) for i in range(ids.count(-200))]
    pixels = torch.cat([processor(image, return_tensors="pt")["pixel_values"] for image in images])
    tokens, image_id = config.vision.grid_size ** 2, model.config.image_token_id
    flat = torch.tensor([x for i in ids for x in ([image_id] * tokens if i == -200 else [i])])
    logits = model.eval()(input_ids=flat[None], pixel_values=pixels).logits[0]
    return logits[flat != image_id, :config.llama.vocab_size]


def check_words(hf, folder: Path, tokenizer, config):
    """transformers' tokenizer of the exported folder gives our ids; its chat template our prompt."""
    from nanoeemllm.prompt import encode_prompt
    theirs = hf.AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        if not re.search(r"<\W*\w+>", text):
            text = text.lstrip(" \u2581") if not tokenizer.prefix_after_special else text   # see tokenizer_with
            assert theirs(text).input_ids == tokenizer.encode(text, bos=True), (folder, text)
    turns = [{"from": "human", "value": "the cat"}, {"from": "gpt", "value": "is red."},
             {"from": "human", "value": "what?"}]
    roles = {"human": "user", "gpt": "assistant"}
    messages = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in turns]
    prompt = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    ours = encode_prompt(tokenizer, turns, config.chat_template)
    assert list(prompt) == ours, (folder, theirs.decode(prompt), theirs.decode(ours))


# ---- chat templates ----

_CHATML = ("{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}"
           "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
_LLAMA3 = ("{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = "
           "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + "
           "'<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
           "{{ content }}{% endfor %}")
_LLAMA3_ASKS = "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
_IF_ASKED = "{% if add_generation_prompt %}" + _LLAMA3_ASKS + "{% endif %}"
_NOT_DEFINED = "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"


def _default_system(words: str) -> str:
    return ("{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\n" + words
            + "<|im_end|>\\n' }}{% endif %}")


def _llava(said: str) -> str:
    return (
        "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}"
        "{% endif %}{# Render all images first #}{% for content in message['content'] | selectattr('type', "
        "'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}{# Render all text next #}{% if message['role'] != "
        "'assistant' %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
        "{{ content['text'] + ' '}}{% endfor %}{% else %}{% for content in message['content'] | "
        "selectattr('type', 'equalto', 'text') %}" + said + "{% endfor %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}")


TEMPLATES = {   # where it is published: ours, theirs
    "ChatML": ("chatml", "{% for message in messages %}" + _CHATML),
    "ChatML, older": ("chatml", _NOT_DEFINED + "{% for message in messages %}" + _CHATML),
    "SmolLM2-Instruct": ("chatml", "{% for message in messages %}" + _default_system(
        "You are a helpful AI assistant named SmolLM, trained by Hugging Face") + _CHATML),
    "ChatML, helpful": ("chatml", "{% for message in messages %}" + _default_system(
        "You are a helpful assistant.") + _CHATML),
    "ChatML, helpful, no stop": ("chatml", "{% for message in messages %}" + _default_system(
        "You are a helpful assistant") + _CHATML),
    "Meta-Llama-3-Instruct": ("llama3", _LLAMA3 + _IF_ASKED),
    "Meta-Llama-3-Instruct, older": ("llama3", _LLAMA3 + _LLAMA3_ASKS),
    "Meta-Llama-3-Instruct, defined": ("llama3", _NOT_DEFINED + _LLAMA3 + _IF_ASKED),
    "llava-1.5-7b-hf": ("vicuna_v1", _llava("{% generation %}{{ content['text'] + ' '}}{% endgeneration %}")),
    "llava-1.5-7b-hf, older": ("vicuna_v1", _llava("{{ content['text'] + ' '}}")),
}
PROBE = [("system", "Say it."), ("user", "What is red?"), ("assistant", "A cat."), ("user", "And blue?")]


def make_templates():
    from nanoeemllm.prompt import TEMPLATES as OURS
    from nanoeemllm.weights.chat import fingerprint, jinja
    tokenizer = hf_llama_tokenizer(True)
    messages = [{"role": role, "content": text} for role, text in PROBE]
    parts = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in PROBE]
    result = {}
    for where, (ours, text) in TEMPLATES.items() | {f"our {x}": (x, jinja(x)) for x in OURS}.items():
        writes = tokenizer.apply_chat_template(parts if where.startswith("llava") else messages,
                                               chat_template=text, tokenize=False, add_generation_prompt=True)
        result[where] = {"ours": ours, "template": text, "fingerprint": fingerprint(text), "writes": writes}
    (GOLDEN / "templates.json").write_text(json.dumps(result, indent=0, sort_keys=True))


if __name__ == "__main__":
    main()
