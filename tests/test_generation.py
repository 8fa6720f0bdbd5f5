"""Answers: encoded images, the static cache, stops, sampling."""

import dataclasses
from pathlib import Path

import pytest
import torch

from nanoeemllm.config import IMAGE_TOKEN as IMAGE
from nanoeemllm.weights.initialize import initialize
from nanoeemllm.cache import KVCache, gather_images
from nanoeemllm.config import PRESETS, UserError
from nanoeemllm.generate import Sampling, StopRule, choose
from nanoeemllm.layout import build_layout
from nanoeemllm.model import EEMLLM
from nanoeemllm.paths import make
from nanoeemllm.weights.tokenizer import Tokenizer, stream_text
from nanoeemllm.toy.world import make_tokenizer
from test_model import picture

GOLDEN = Path(__file__).parent / "golden"
COMPOSITE = ["eemllm", "naavit", "saisa", "flamingo"]
LOOKING_AT_TEXT = ["llava", "eemllm-f", "yopo"]
PATHS = {"eemllm-f": make("eemllm-f", composite_layers=(1, 2)), "flamingo": make("flamingo", every=2),
         "yopo": make("yopo", window=3, last_visual_layer=3, prune_heads=2)}
IMAGES = [picture(1), picture(2, 30, 48), picture(3, 48, 24)]


def make_model(path="eemllm", dtype=torch.float32, layers=4, spread=8) -> EEMLLM:
    """Weights wide enough that the picture matters to the answers."""
    tiny = PRESETS["tiny"]
    torch.manual_seed(0)
    model = EEMLLM(dataclasses.replace(tiny, visual_path=PATHS.get(path, make(path)),
                                       llama=dataclasses.replace(tiny.llama, num_hidden_layers=layers),
                                       vision=dataclasses.replace(tiny.vision, num_hidden_layers=1)))
    initialize(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.mul_(spread if p.dim() > 1 else 1)
            if name.endswith("gate"):
                p.fill_(0.5)
    return model.to(dtype)


PROMPTS = [  # ids and which of IMAGES stand in them
    ([1, IMAGE, 5, 6], [0]), ([IMAGE, 9, 4, 2, 8], [0]), ([3, 3, IMAGE, 7], [1]), ([1, IMAGE, 7, 7, IMAGE, 2], [0, 1]),
    ([4, 5], []), ([1, IMAGE, 2], [0]), ([6, IMAGE, IMAGE, IMAGE, 3], [2, 1, 0])]


# ---- pictures paid for once ----

@pytest.mark.parametrize("path", COMPOSITE)
def test_kept_pictures_give_the_logits_and_answers_of_images(path):
    """At any place, in any order and number; logits to 1e-4 in float32, greedy answers token for token."""
    model = make_model(path)
    seen = model.encode_images(IMAGES)
    answers = []
    for ids, numbers in PROMPTS:
        images, image_kv = [IMAGES[n] for n in numbers], [seen[n] for n in numbers]
        expected = model.logits(ids, images)
        torch.testing.assert_close(model.logits(ids, image_kv=image_kv), expected, rtol=0, atol=1e-4)
        answers.append(list(model.generate(ids, images, max_new_tokens=8)))
        assert list(model.generate(ids, image_kv=image_kv, max_new_tokens=8)) == answers[-1]
    together = model.generate_batch([ids for ids, _ in PROMPTS], image_kv=[[seen[n] for n in ns] for _, ns in PROMPTS],
                                    max_new_tokens=8)
    assert together == answers
    if path != "flamingo":                    # two queries of different pictures; its one-layer gate moves little
        assert answers[0] != list(model.generate(PROMPTS[0][0], [IMAGES[2]], max_new_tokens=8))


def test_kept_pictures_exactly():
    """In float64 turning a key and computing it at its place differ by the angles' float32 rounding alone."""
    model = make_model(dtype=torch.float64)
    seen = model.encode_images(IMAGES)
    ids = [3] * 40 + [IMAGE, 5, IMAGE, 6]
    expected = model.logits(ids, IMAGES[:2])
    assert (model.logits(ids, image_kv=seen[:2]) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_questions_about_one_picture_share_its_keys():
    """Prompts with it at one place add no rows, and none are copied; at another place there is a second copy."""
    model = make_model()
    seen = model.encode_images(IMAGES)
    n = len(seen[0].k[0])
    def gathered(prompts, image_kv):
        _, layout = build_layout(prompts, [[p.grid for p in group] for group in image_kv])
        return gather_images(model.decoder, image_kv, layout)
    many = gathered([[IMAGE, i, i] for i in range(50)], [[seen[0]]] * 50)
    assert [k.data_ptr() for k in many.k] == [k.data_ptr() for k in seen[0].k]
    assert len(many.k[0]) == n and many.layout.visual.start.tolist() == [0] * 50
    assert len(gathered([[IMAGE, 1], [1, IMAGE, 1], [2, IMAGE, 2]], [[seen[0]]] * 3).v[0]) == 2 * n


def test_a_second_question_makes_nothing_of_visual_rows():
    model = make_model()
    seen = model.encode_images(IMAGES[:1])
    rows = []
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda module, args, out: rows.append(len(args[0])))
    list(model.generate([1, IMAGE, 5, 6], image_kv=seen, max_new_tokens=2))
    assert max(rows) == 3 and len(seen[0].k[0]) > 3


@pytest.mark.parametrize("path", LOOKING_AT_TEXT)
def test_paths_that_look_at_text_say_why_they_cannot_keep(path):
    with pytest.raises(UserError, match="visual tokens look at the text"):
        make_model(path).encode_images(IMAGES)


def test_pictures_must_fit_the_prompt():
    model = make_model()
    with pytest.raises(UserError, match="1 <image> in the text but 2 picture"):
        list(model.generate([1, IMAGE, 2], image_kv=model.encode_images(IMAGES[:2])))
    with pytest.raises(UserError, match="1 <image> in the text but 0 picture"):
        list(model.generate([1, IMAGE, 2], image_kv=[]))


# ---- the static cache ----

def static_cache(model, samples=7, text=64, visual=600) -> KVCache:
    layout = build_layout([[1] * text + [IMAGE]] * samples, [[(1, visual)]] * samples)[1]
    return KVCache(model.config.llama, layout, 20, model.dtype, static=True)


@pytest.mark.parametrize("path", [*COMPOSITE, *LOOKING_AT_TEXT])
def test_a_static_cache_gives_the_same_answers_prompt_after_prompt(path):
    """What a CUDA graph needs: one cache, its old contents no matter, nothing in it moved; half-empty batches shrink."""
    model = make_model(path)
    prompts, images = [ids for ids, _ in PROMPTS], [[IMAGES[n] for n in ns] for _, ns in PROMPTS]
    free = model.generate_batch(prompts, images, max_new_tokens=12)
    stop = {free[0][2], free[1][5], free[2][3], free[4][7]}
    expected = [next((answer[:i] for i, token in enumerate(answer) if token in stop), answer) for answer in free]
    cache = model.spare_cache = static_cache(model)
    places = []
    for _ in range(2):
        assert model.generate_batch(prompts, images, max_new_tokens=12, stop_ids=stop) == expected
        assert list(model.generate(prompts[3], images[3], max_new_tokens=12)) == free[3]
        assert model.spare_cache is cache
        places.append([x.data_ptr() for x in (*cache.k_text, *cache.v_text, cache.table,
                                              *cache.k_visual, *cache.v_visual)])
    assert places[0] == places[1]


def test_a_prompt_that_does_not_fit_gets_a_new_cache():
    model = make_model()
    small = model.spare_cache = static_cache(model, samples=1, text=4, visual=8)
    assert small.capacity == 256                     # rounded up, so that the next prompt fits too
    list(model.generate([3] * 250, max_new_tokens=10))
    assert model.spare_cache is not small


def test_two_answers_at_a_time_do_not_share_a_cache():
    model = make_model()
    alone = [list(model.generate(ids, [IMAGES[0]], max_new_tokens=6)) for ids in ([1, IMAGE, 5], [IMAGE, 9, 4])]
    model.spare_cache = static_cache(model, 1)
    both = [model.generate(ids, [IMAGES[0]], max_new_tokens=6) for ids in ([1, IMAGE, 5], [IMAGE, 9, 4])]
    assert [list(pair) for pair in zip(*both)] == [list(pair) for pair in zip(*alone)]


def test_a_full_cache_says_both_numbers():
    model = make_model()
    hidden, cache = model.prefill([[1, 2, 3]], None, 1)
    model.decoder.decode(torch.tensor([4]), cache)
    with pytest.raises(UserError, match="holds 4 text tokens a sample and 5 are asked for"):
        model.decoder.decode(torch.tensor([4]), cache)


# ---- ends ----

def toy_model() -> EEMLLM:
    model = make_model()
    model.tokenizer = Tokenizer(make_tokenizer())
    return model


def test_a_stop_string_ends_an_answer_alone_and_in_a_batch():
    model = toy_model()
    free = model.generate_batch([[5, 6], [9, 4, 2], [11]], max_new_tokens=20, stop_ids=set())
    text = model.tokenizer.decode(free[0])
    string = text[8:14]
    cut = list(model.generate([5, 6], max_new_tokens=20, stop_ids=set(), stop_strings=(string,)))
    assert free[0][:len(cut)] == cut and string in model.tokenizer.decode(cut)
    assert string not in model.tokenizer.decode(cut[:-1])
    batch = model.generate_batch([[5, 6], [9, 4, 2], [11]], max_new_tokens=20, stop_ids=set(), stop_strings=(string,))
    assert batch[0] == cut
    assert "".join(stream_text(model.tokenizer, iter(free[0]), (string,))) == text[:text.index(string)]
    with pytest.raises(UserError, match="stop string is empty"):
        model.generate_batch([[1]], stop_strings=("",))


class Pieces:
    """A tokenizer whose stream is what it is given."""
    def stream(self, ids):
        yield from ids


@pytest.mark.parametrize("pieces, stops, expected", [
    (["He", "llo\n", "US", "ER:", " x"], ("\nUSER:",), ["He", "llo"]),
    (["a\n", "U", "b"], ("\nUSER:",), ["a", "\nUb"]),                      # held back until it cannot be one
    (["aab"], ("ab", "aa"), []), (["x##", "y"], ("###",), ["x", "##y"]), (["x#"], ("##",), ["x", "#"]),
    (["x", "y"], (), ["x", "y"])])
def test_text_that_may_be_a_stop_string_is_held_back(pieces, stops, expected):
    assert list(stream_text(Pieces(), pieces, stops)) == expected


def test_streamed_text_is_never_half_a_character():
    import tokenizers
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    inner = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(sorted(alphabet))} | {"</s>": 256}, []))
    inner.pre_tokenizer, inner.decoder = tokenizers.pre_tokenizers.ByteLevel(False), tokenizers.decoders.ByteLevel()
    tokenizer = Tokenizer(inner)                                           # a byte a token
    text = "naïve 猫 🐈‍⬛ ok"
    pieces = list(stream_text(tokenizer, tokenizer.encode(text)))
    assert "".join(pieces) == text and len(tokenizer.encode("🐈")) == 4 and "�" not in "".join(pieces)
    assert "".join(stream_text(tokenizer, tokenizer.encode(text), ("猫 ",))) == "naïve "


# ---- sampling ----

def test_same_seed_same_text():
    model = make_model(spread=2)
    draw = lambda seed: list(model.generate([1, IMAGE, 5], IMAGES[:1], max_new_tokens=12, temperature=1.0, seed=seed))
    assert draw(1) == draw(1) != draw(2)


LOGITS = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()


@pytest.mark.parametrize("options, possible", [
    ({}, {0, 1, 2, 3}), (dict(top_k=2), {0, 1}), (dict(top_p=0.6), {0, 1}), (dict(top_p=0.5), {0}), (dict(top_p=1e-6), {0}),
    (dict(min_p=0.31), {0, 1}), (dict(min_p=0.25), {0, 1, 2}), (dict(top_k=3, top_p=0.96, min_p=0.2), {0, 1, 2}),
    (dict(top_k=9), {0, 1, 2, 3})])
def test_what_may_be_drawn(options, possible):
    generator = torch.Generator().manual_seed(0)
    drawn = choose(LOGITS.expand(4000, -1), Sampling(temperature=1.0, **options), generator, None)
    assert set(drawn.tolist()) == possible
    share = LOGITS.exp()[0, sorted(possible)] / LOGITS.exp()[0, sorted(possible)].sum()
    torch.testing.assert_close(torch.bincount(drawn, minlength=4)[sorted(possible)] / 4000, share, rtol=0, atol=0.03)


def test_temperature_and_repetition_penalty():
    generator = torch.Generator().manual_seed(0)
    hot = choose(LOGITS.expand(4000, -1), Sampling(temperature=2.0), generator, None)
    expected = (LOGITS[0] / 2).softmax(0)
    torch.testing.assert_close(torch.bincount(hot, minlength=4) / 4000, expected, rtol=0, atol=0.03)
    seen = torch.tensor([[True, False, False, False]])
    assert choose(LOGITS, Sampling(repetition_penalty=3.0), None, seen).item() == 1          # 0.5^3 < 0.3
    assert choose(-LOGITS, Sampling(repetition_penalty=9.0), None, ~seen).item() == 0        # positive ones are divided
    model = make_model(spread=2)
    said = list(model.generate([1, 2], max_new_tokens=30, repetition_penalty=1e6))
    assert len(set(said)) == 30 and not set(said) & {1, 2}                                   # nothing twice


@pytest.mark.parametrize("options, what", [
    (dict(temperature=-0.1), "temperature is -0.1; it must be from 0 to 1e6"), (dict(temperature=float("nan")), "temperature is nan"),
    (dict(top_k=-1), "top-k is -1"), (dict(top_p=0.0), "top-p is 0.0"), (dict(top_p=1.5), "top-p"), (dict(min_p=2.0), "min-p"),
    (dict(repetition_penalty=0.0), "repetition-penalty")])
def test_sampling_options_out_of_range(options, what):
    with pytest.raises(UserError, match=what):
        Sampling(**options)


def test_stop_without_strings_reads_no_text():
    assert not StopRule(frozenset({1})).is_met([1, 2, 3])
    with pytest.raises(UserError, match="max-new-tokens is 0"):
        list(make_model().generate([1], max_new_tokens=0))


def test_stop_strings_and_words_of_tokens_that_are_bytes():
    """A tokenizer that has only bytes for these characters: a window that begins within one must not hide the others."""
    from nanoeemllm.weights.published import read_tokenizer
    from nanoeemllm.evaluation.attention_map import words_of
    tokenizer = read_tokenizer(GOLDEN / "sources" / "vicuna")
    said = tokenizer.encode("the 猫犬鳥魚馬牛羊 sat")
    stop = StopRule(strings=("馬",), tokenizer=tokenizer)
    ends = [n for n in range(1, len(said) + 1) if stop.is_met(said[:n])]
    assert "馬" in tokenizer.decode(said[:ends[0]]) and "馬" not in tokenizer.decode(said[:ends[0] - 1])
    words = words_of(tokenizer, said)
    assert [word for word, _ in words] == ["the", "猫犬鳥魚馬牛羊", "sat"]
    assert tokenizer.decode([said[n] for n in words[1][1]]).strip() == "猫犬鳥魚馬牛羊"


def test_low_temperatures_do_not_overflow():
    logits = torch.tensor([[5.0, 80.0, -3.0]])
    generator = torch.Generator().manual_seed(0)
    for temperature in (1e-3, 1e-30, 1e-40):
        assert choose(logits, Sampling(temperature=temperature), generator, None).item() == 1


def test_a_word_beyond_the_vocabulary_is_refused():
    with pytest.raises(UserError, match="token 128 is beyond the model's vocabulary of 128"):
        make_model().logits([1, 128])
