"""Every visual path against a slow reference on the merged sequence, written from the papers' definitions.

The reference goes through a sample row by row of scores: one dense mask a layer and head says which row sees which,
rows of both kinds lie in one tensor in the order of their positions, and what a path leaves out is masked, not skipped.
"""

import dataclasses
import json
import math

import pytest
import torch
import torch.nn.functional as F

from layouts import HAND_MADE, random_layout, random_samples, rows_of, seeded
from nanoeemllm.attention import empty_span
from nanoeemllm.border.command import Parser
from nanoeemllm.border.typed import read_config
from nanoeemllm.cache import KVCache
from nanoeemllm.config import LlamaConfig, ModelConfig, UserError, VisionConfig, VisualPath
from nanoeemllm.decoder import Decoder
from nanoeemllm.layout import build_layout
from nanoeemllm.paths import add_flags, from_args, is_new_weight, make
from test_decoder import TINY, rms_norm

FEATURES = 20                                                # width of the picture encoder's features, for saisa
KEPT = ((0, 1, 2, 3), (1, 3), (2,))
PATHS = {
    "llava": make("llava"),
    "eemllm": make("eemllm"),
    "eemllm-f first": make("eemllm-f", composite_layers=(0,)),
    "eemllm-f later": make("eemllm-f", composite_layers=(1, 2)),
    "naavit": make("naavit"),
    "saisa": make("saisa"),
    "yopo": make("yopo", window=3, last_visual_layer=2),
    "yopo all layers": make("yopo", window=5, ffn_ratio=3, last_visual_layer=3, prune_heads=3),
    "yopo kept heads": make("yopo", window=3, last_visual_layer=3, kept_heads=KEPT),
    "yopo first layer": make("yopo", last_visual_layer=1),
    "flamingo 1": make("flamingo", every=1),
    "flamingo 2": make("flamingo", every=2),
}


def make_decoder(path: VisualPath, kv_heads: int = 2, **changes) -> Decoder:
    torch.manual_seed(1)
    decoder = Decoder(LlamaConfig(**{**TINY, "num_key_value_heads": kv_heads, **changes}), path, FEATURES).double()
    for p in decoder.parameters():
        torch.nn.init.normal_(p, mean=0.5 if p.dim() == 1 else 0, std=0.2)
    return decoder


def visual_rows(decoder: Decoder, V: int, seed: int = 0) -> torch.Tensor:
    return seeded(V, FEATURES if decoder.path.takes_features else decoder.config.hidden_size, seed=seed)


# ---- the slow reference ----

def merged_rows(layout, b: int, grids: list) -> list[tuple]:
    """A sample's rows in order: (position, picture or None, (y, x) or None, row in its own tensor)."""
    t, v = rows_of(layout.text, b), rows_of(layout.visual, b)
    rows = [(int(layout.position[r]), None, None, r) for r in range(t.start, t.stop)]
    patches = [(number, (y, x)) for number, (h, w) in enumerate(grids) for y in range(h) for x in range(w)]
    rows += [(int(layout.position[layout.num_text + r]), *patch, r) for r, patch in zip(range(v.start, v.stop), patches)]
    return sorted(rows)


def sees(config: VisualPath, llama: LlamaConfig, layer: int, head: int, query: tuple, key: tuple) -> bool:
    """May this row see that one, in this layer and head?"""
    name = config.name
    if name == "eemllm-f":
        name = "eemllm" if layer in config.composite_layers else "llava"
    (q_position, q_picture, q_place, _), (k_position, k_picture, k_place, _) = query, key
    if name == "yopo" and k_picture is not None:             # a visual key
        if layer >= config.last_visual_layer or head not in config.heads(llama, layer):
            return False
        if q_picture is not None:                            # neighbours, before or after it in the sequence
            near = all(abs(a - b) <= config.window // 2 for a, b in zip(q_place, k_place))
            return q_picture == k_picture and near
    if name == "flamingo" and k_picture is not None:
        return False
    if q_picture is not None and name != "llava":
        if name == "eemllm":
            return q_position == k_position
        return name == "yopo" and head in config.heads(llama, layer) and k_position <= q_position and k_picture is None
    return k_position <= q_position


def attention(decoder, weights, h, keys_from, mask, position=None):
    """(N, C) queries of h over keys of keys_from under mask (H, N, M); rows that see nothing give 0. Without position
    nothing is turned."""
    c = decoder.config
    q, k, v = ((x @ w.weight.T).view(len(x), -1, c.head_dim)
               for x, w in ((h, weights.q_proj), (keys_from, weights.k_proj), (keys_from, weights.v_proj)))
    if position is not None:
        angle = position[:, None] * (1 / c.rope_theta ** (torch.arange(0, c.head_dim, 2) / c.head_dim))
        turn = torch.complex(angle.cos().double(), angle.sin().double())[:, None]
        q, k = (torch.complex(x[..., :c.head_dim // 2], x[..., c.head_dim // 2:]) * turn for x in (q, k))
        q, k = (torch.cat([x.real, x.imag], -1) for x in (q, k))
    heads = []
    for head in range(c.num_attention_heads):
        shared = head * c.num_key_value_heads // c.num_attention_heads
        scores = (q[:, head] @ k[:, shared].T / math.sqrt(c.head_dim)).masked_fill(~mask[head], -1e30)
        heads.append((scores.softmax(-1) * mask[head]) @ v[:, shared])
    return torch.cat(heads, -1) @ weights.o_proj.weight.T


def swiglu(mlp, h):
    return (F.silu(h @ mlp.gate_proj.weight.T) * (h @ mlp.up_proj.weight.T)) @ mlp.down_proj.weight.T


def partial_swiglu(mlp, h, neurons):
    active = F.silu(h @ mlp.gate_proj.weight.T) * (h @ mlp.up_proj.weight.T)
    return (active * (torch.arange(active.shape[1]) < neurons)) @ mlp.down_proj.weight.T


def slow(decoder: Decoder, config: VisualPath, ids, visual, samples_grids, layout) -> torch.Tensor:
    """Hidden rows of the text (T, C)."""
    c, text, out = decoder.config, decoder.embed_tokens(ids), []
    for b in range(layout.num_samples):
        rows = merged_rows(layout, b, samples_grids[b])
        position = torch.tensor([r[0] for r in rows])
        is_visual = torch.tensor([r[1] is not None for r in rows])
        features = torch.stack([visual[r[3]] if r[1] is not None else visual.new_zeros(visual.shape[1]) for r in rows])
        x = torch.stack([text[r[3]] if r[1] is None else
                         (text.new_zeros(c.hidden_size) if config.name == "saisa" else visual[r[3]]) for r in rows])
        kept = x
        for i, layer in enumerate(decoder.layers):
            if config.name == "saisa":
                p = layer.visual_projector
                made = F.gelu(features @ p.linear_1.weight.T + p.linear_1.bias) @ p.linear_2.weight.T + p.linear_2.bias
                x = torch.where(is_visual[:, None], made, x)
            if config.name == "flamingo" and (i + 1) % config.every == 0:
                x = torch.where(is_visual[:, None], x, cross(decoder, layer.cross, x, kept, rows))
            mask = torch.tensor([[[sees(config, c, i, head, q, k) for k in rows] for q in rows]
                                 for head in range(c.num_attention_heads)])
            h = rms_norm(x, layer.input_layernorm.weight, c.rms_norm_eps)
            x = x + attention(decoder, layer.self_attn, h, h, mask, position)
            h = rms_norm(x, layer.post_attention_layernorm.weight, c.rms_norm_eps)
            added = swiglu(layer.mlp, h)
            if config.name == "yopo":
                part = partial_swiglu(layer.mlp, h, c.intermediate_size // config.ffn_ratio)
                added = torch.where(is_visual[:, None], part, added)
            x = x + added
        out.append(rms_norm(x, decoder.norm.weight, c.rms_norm_eps)[~is_visual])
    return torch.cat(out)


def cross(decoder, block, x, visual, rows):
    """Flamingo's gated block; a row looks at the last picture before it."""
    eps = decoder.config.rms_norm_eps

    def looks_at(query, key):
        before = [r[1] for r in rows if r[1] is not None and r[0] <= query[0]]
        return key[1] is not None and bool(before) and key[1] == before[-1]

    mask = [torch.tensor([[looks_at(q, k) for k in rows] for q in rows])] * decoder.config.num_attention_heads
    h, keys_from = rms_norm(x, block.input_layernorm.weight, eps), rms_norm(visual, block.visual_layernorm.weight, eps)
    x = x + block.attention_gate.tanh() * attention(decoder, block.attention, h, keys_from, mask)
    return x + block.mlp_gate.tanh() * swiglu(block.mlp, rms_norm(x, block.post_attention_layernorm.weight, eps))


# ---- the tests ----

def layout_of(seed: int):
    samples, grids = random_samples(seed) if seed else map(list, zip(*HAND_MADE))
    ids, layout = build_layout(samples, grids)
    return ids, layout, grids


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("seed", range(3))
def test_equals_the_slow_reference(seed, name, kv_heads):
    """Hidden rows, and the gradients of every weight and of what the pictures gave."""
    decoder = make_decoder(PATHS[name], kv_heads)
    ids, layout, grids = layout_of(seed)
    visual = visual_rows(decoder, layout.num_visual, seed).requires_grad_()
    weight = seeded(len(ids), 32, seed=seed + 1)
    results = []
    for hidden in (decoder(ids, visual, layout), slow(decoder, PATHS[name], ids, visual, grids, layout)):
        leaves = [visual, *decoder.parameters()]
        grads = torch.autograd.grad((hidden * weight).sum(), leaves, allow_unused=True)
        results.append((hidden, [torch.zeros_like(p) if g is None else g for p, g in zip(leaves, grads)]))
    (hidden, grads), (expected, expected_grads) = results
    torch.testing.assert_close(hidden, expected, rtol=1e-8, atol=1e-8)
    for got, want in zip(grads, expected_grads):
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", PATHS)
def test_equals_the_slow_reference_in_float32(name):
    decoder = make_decoder(PATHS[name]).float()
    ids, layout, grids = layout_of(0)
    visual = visual_rows(decoder, layout.num_visual)
    expected = slow(decoder.double(), PATHS[name], ids, visual, grids, layout)
    torch.testing.assert_close(decoder.float()(ids, visual.float(), layout).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("seed", range(3))
def test_cached_equals_uncached(name, seed):
    """Prompts read at once and then token by token give the rows of one full pass; a sample leaves on the way."""
    decoder = make_decoder(PATHS[name])
    samples, grids = random_samples(seed) if seed else map(list, zip(*HAND_MADE))
    samples = [s + [1] for s in samples]
    new = torch.randint(50, (len(samples), 4), generator=torch.Generator().manual_seed(seed))
    ids, layout = build_layout(samples, grids)
    visual = visual_rows(decoder, layout.num_visual, seed)
    full_ids, full_layout = build_layout([s + n.tolist() for s, n in zip(samples, new)], grids)
    for static in (False, True):
        with torch.no_grad():
            full = decoder(full_ids, visual, full_layout)
            cache = KVCache(decoder.config, layout, 4, torch.float64, static=static)
            read = decoder(ids, visual, layout, cache)
            torch.testing.assert_close(read[-1], full[full_layout.text.start[-1] + layout.text.length[-1] - 1].double())
            alive = torch.arange(len(samples))
            for step in range(4):
                if step == 2 and len(alive) > 1:
                    cache.select(torch.arange(1, len(alive)))
                    alive = alive[1:]
                hidden = decoder.decode(new[alive, step], cache)
                rows = full_layout.text.start[alive] + layout.text.length[alive] + step
                torch.testing.assert_close(hidden, full[rows.long()], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", PATHS)
def test_a_sample_moves_no_bit_of_another(name):
    decoder = make_decoder(PATHS[name]).float()
    ids, layout, V = random_layout(0)
    visual = visual_rows(decoder, V).float()
    changed_ids, changed_visual = ids.clone(), visual.clone()
    changed_ids[rows_of(layout.text, 2)] = (ids[rows_of(layout.text, 2)] + 1) % 50
    changed_visual[rows_of(layout.visual, 2)] *= -3
    before, after = decoder(ids, visual, layout), decoder(changed_ids, changed_visual, layout)
    for b in range(layout.num_samples):
        assert torch.equal(before[rows_of(layout.text, b)], after[rows_of(layout.text, b)]) == (b != 2)


@pytest.mark.parametrize("name", PATHS)
def test_recomputed_activations_give_the_same_gradients(name):
    decoder = make_decoder(PATHS[name])
    ids, layout, V = random_layout(0)
    grads = []
    for decoder.checkpoint_activations in (False, True):
        decoder.zero_grad()
        decoder(ids, visual_rows(decoder, V), layout).square().sum().backward()
        grads.append([p.grad.clone() for p in decoder.parameters() if p.grad is not None])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["saisa", "flamingo 2"])
def test_own_weights_learn_in_both_stages_and_have_their_names(name):
    decoder = make_decoder(PATHS[name])
    ids, layout, V = random_layout(0)
    own = {n for n, _ in decoder.named_parameters() if is_new_weight("decoder." + n)}
    if name == "saisa":
        assert own == {f"layers.{i}.visual_projector.linear_{k}.{what}" for i in range(3) for k in (1, 2)
                       for what in ("weight", "bias")}
    else:
        assert own and all(n.startswith("layers.1.cross.") for n in own)
    decoder(ids, visual_rows(decoder, V), layout).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for n, p in decoder.named_parameters() if n in own)


def test_flamingo_begins_as_the_language_model_alone():
    config = LlamaConfig(**TINY, num_key_value_heads=2)
    torch.manual_seed(0)
    decoder = Decoder(config, make("flamingo", every=1), FEATURES).double()
    plain = Decoder(config, make("eemllm")).double()
    plain.load_state_dict({n: p for n, p in decoder.state_dict().items() if ".cross." not in n})
    ids, layout, V = random_layout(0)
    text_alone = dataclasses.replace(layout, visual=empty_span(layout.visual), images=(),
                                     sees_visual=torch.zeros_like(layout.sees_visual))
    torch.testing.assert_close(decoder(ids, seeded(V, 32), layout), plain(ids, seeded(V, 32), text_alone))


def test_eemllm_f_is_llava_with_no_and_eemllm_with_every_layer():
    ids, layout, V = random_layout(0)
    rows = {name: make_decoder(config)(ids, seeded(V, 32), layout) for name, config in {
        "llava": PATHS["llava"], "eemllm": PATHS["eemllm"], "none": make("eemllm-f"),
        "all": make("eemllm-f", composite_layers=(0, 1, 2))}.items()}
    torch.testing.assert_close(rows["none"], rows["llava"])
    torch.testing.assert_close(rows["all"], rows["eemllm"])


def test_yopo_caches_the_heads_it_keeps_and_nothing_from_l_cut_on():
    path = make("yopo", last_visual_layer=2, kept_heads=((0, 1, 2, 3), (3,), (0,)))
    decoder = make_decoder(path, kv_heads=4)
    ids, layout, V = random_layout(0)
    cache = KVCache(decoder.config, layout, 1, torch.float64)
    decoder(ids, seeded(V, 32), layout, cache)
    assert [tuple(k.shape) for k in cache.k_visual] == [(V, 4, 8), (V, 1, 8), (V, 0, 8)]


def test_what_a_path_leaves_out_is_not_computed():
    """Rows through the projections of layer 1 of 3."""
    ids, layout, V = random_layout(0)
    T = len(ids)
    N = T + V
    for name, queries, keys, ffn in (("llava", N, N, N), ("eemllm", T, N, N), ("naavit", T, N, N), ("saisa", T, N, T),
                                     ("flamingo 2", T, T, T)):
        decoder, seen = make_decoder(PATHS[name]), {}
        layer = decoder.layers[1]
        for key, module in (("q", layer.self_attn.q_proj), ("k", layer.self_attn.k_proj), ("ffn", layer.mlp)):
            module.register_forward_hook(lambda module, args, out, key=key: seen.update(
                {key: seen.get(key, 0) + len(args[0])}))
        decoder(ids, visual_rows(decoder, V), layout)
        assert (seen["q"], seen["k"], seen["ffn"]) == (queries, keys, ffn), name


# ---- settings ----

def config_of(path: VisualPath, others=()) -> ModelConfig:
    llama = LlamaConfig(**{**TINY, "num_hidden_layers": 4}, num_key_value_heads=2)
    return ModelConfig(llama, VisionConfig(), path, other_paths=others)


def flags(line: str, base: ModelConfig | None = None):
    parser = Parser("")
    add_flags(parser)
    args = parser.parse_args(line.split())
    return from_args(args, base or config_of(make("eemllm")))


def test_flags_make_a_path_and_change_one():
    assert flags("") == make("eemllm")
    assert flags("--visual-path eemllm-f --composite-layers 0,2-3").composite_layers == (0, 2, 3)
    yopo = flags("--visual-path yopo --window 3 --ffn-ratio 4 --last-visual-layer 2 --prune-heads 1")
    assert yopo == make("yopo", window=3, ffn_ratio=4, last_visual_layer=2, prune_heads=1)
    assert flags("--window 7", config_of(yopo)) == dataclasses.replace(yopo, window=7)
    kept = (*KEPT, (0,))
    calibrated = config_of(dataclasses.replace(yopo, kept_heads=kept))
    assert flags("--window 7", calibrated).kept_heads == kept
    assert flags("--prune-heads 2", calibrated).kept_heads == ()
    assert flags("--prune-heads 1", calibrated).kept_heads == kept
    # calibrated for weights whose own path is another
    beside = config_of(make("llava"), (dataclasses.replace(yopo, kept_heads=kept),))
    assert flags("", beside) == make("llava") and flags("--visual-path yopo", beside).kept_heads == kept


@pytest.mark.parametrize("name", PATHS)
def test_settings_come_back_from_json(name):
    config = ModelConfig(LlamaConfig(**TINY, num_key_value_heads=2), VisionConfig(), PATHS[name],
                         other_paths=(PATHS["yopo kept heads"],))
    assert read_config(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("settings, said", [
    ({"name": "eemllm-f"}, "needs its composite layers"),
    ({"name": "flamingo", "every": 4}, "every 3 or less"),
    ({"name": "eemllm-f", "composite_layers": [3]}, "layers 0 to 2"),
    ({"name": "yopo", "last_visual_layer": 4}, "has 3 layers"),
    ({"name": "yopo", "kept_heads": [[0]]}, "calibrate anew"),
    ({"name": "yopo", "kept_heads": [[0], [], [1]]}, "at least one"),
    ({"name": "yopo", "kept_heads": [[0], [-1], [1]]}, "kept_heads"),
    ({"name": "yopo", "kept_heads": [[1, 0], [1], [1]]}, "rising"),
    ({"name": "yopo", "prune_heads": 4}, "at least one"), ({"name": "yopo", "window": 4}, "odd"),
    ({"name": "yopo", "window": "5"}, "window"), ({"name": "lava"}, "known: llava"),
    ({"name": "eemllm-f", "composite_layers": 3}, "must be a list"), ({"window": 5}, "'None' is not known; known: llava"),
    ({"name": "yopo", "ffn_ratio": 49}, "neurons"), ({"name": "yopo", "bogus": 1}, "unknown key"),
])
def test_settings_that_do_not_fit_are_refused(settings, said):
    whole = ModelConfig(LlamaConfig(**TINY, num_key_value_heads=2), VisionConfig()).to_dict()
    with pytest.raises(UserError, match=said):
        read_config({**whole, "visual_path": settings})


def test_flags_that_make_no_sense_are_refused():
    for line in ("--composite-layers 3-", "--composite-layers a", "--composite-layers 3-1",
                 "--composite-layers=", "--window 0", "--ffn-ratio -1", "--prune-heads -1",
                 "--composite-layers 0-999999999999"):
        with pytest.raises(UserError, match=line.split()[0].strip("=")):
            flags(line)
    for line in ("--composite-layers 1", "--visual-path llava --aligner vf",
                 "--visual-path yopo --every 2", "--prune-heads 0"):
        with pytest.raises(UserError, match="is a setting of .*: add --visual-path"):
            flags(line)


@pytest.mark.parametrize("aligner", ["v", "o", "vf", "of"])
def test_an_aligner_that_does_not_fit_narrow_heads_is_refused(aligner):
    llama = LlamaConfig(**TINY | {"head_dim": 2}, num_key_value_heads=2)
    with pytest.raises(UserError, match="give both or none of v and o"):
        make("eemllm", aligner=aligner).check(llama)
    for fits in (make("eemllm"), make("eemllm", aligner="f"), make("llava")):
        fits.check(llama)
