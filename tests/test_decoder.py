"""The oracle: the composite decoder equals a plain Llama over the merged sequence under a mask.

The mask: causal rows for text; visual rows see themselves alone (`eemllm`) or everything before them (`llava`).
"""

import math

import pytest
import torch

from layouts import random_layout, rows_of, seeded
from nanoeemllm.cache import KVCache
from nanoeemllm.config import LlamaConfig, RopeScaling
from nanoeemllm.decoder import Decoder
from nanoeemllm.paths import make

TINY = dict(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, head_dim=8,
            max_position_embeddings=256)
LAYOUTS = range(12)


def make_decoder(path, **changes) -> Decoder:
    config = LlamaConfig(**{**TINY, "num_key_value_heads": 2, **changes})
    torch.manual_seed(1)
    decoder = Decoder(config, path).double()
    for p in decoder.parameters():
        torch.nn.init.normal_(p, mean=0.5 if p.dim() == 1 else 0, std=0.2)
    return decoder


def rms_norm(x, weight, eps):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def plain_llama(decoder: Decoder, x: torch.Tensor, position: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(N, C) of one sample -> logits (N, vocabulary), written without any of the package's functions."""
    c = decoder.config
    angle = position[:, None] * (1 / c.rope_theta ** (torch.arange(0, c.head_dim, 2) / c.head_dim))   # float32, as
    turn = torch.complex(angle.cos().double(), angle.sin().double())[:, None, :]     # published; (N, 1, D/2)

    def rope(h):
        pairs = torch.complex(h[..., :c.head_dim // 2], h[..., c.head_dim // 2:]) * turn
        return torch.cat([pairs.real, pairs.imag], -1)

    for layer in decoder.layers:
        a, m = layer.self_attn, layer.mlp
        h = rms_norm(x, layer.input_layernorm.weight, c.rms_norm_eps)
        q, k, v = ((h @ w.weight.T).view(len(x), -1, c.head_dim) for w in (a.q_proj, a.k_proj, a.v_proj))
        q, k = rope(q), rope(k)
        heads = []
        for head in range(c.num_attention_heads):
            shared = head * c.num_key_value_heads // c.num_attention_heads
            scores = q[:, head] @ k[:, shared].T / math.sqrt(c.head_dim)
            heads.append(scores.masked_fill(~mask, -math.inf).softmax(-1) @ v[:, shared])
        x = x + torch.cat(heads, -1) @ a.o_proj.weight.T
        h = rms_norm(x, layer.post_attention_layernorm.weight, c.rms_norm_eps)
        x = x + (torch.nn.functional.silu(h @ m.gate_proj.weight.T) * (h @ m.up_proj.weight.T)) @ m.down_proj.weight.T
    return rms_norm(x, decoder.norm.weight, c.rms_norm_eps) @ decoder.lm_head.weight.T


def oracle(decoder: Decoder, ids, visual, layout, visual_rows_are_causal: bool) -> torch.Tensor:
    """Logits of the text rows (T, vocabulary), sample by sample."""
    text, out = decoder.embed_tokens(ids), []
    for b in range(layout.num_samples):
        t, v = rows_of(layout.text, b), rows_of(layout.visual, b)
        x = torch.cat([text[t], visual[v]])
        position = torch.cat([layout.position[:layout.num_text][t], layout.position[layout.num_text:][v]])
        order = position.argsort()
        is_visual = (torch.arange(len(x)) >= t.stop - t.start)[order]
        mask = torch.ones(len(x), len(x), dtype=torch.bool).tril()
        if not visual_rows_are_causal:
            mask[is_visual] = torch.eye(len(x), dtype=torch.bool)[is_visual]
        out.append(plain_llama(decoder, x[order], position[order], mask)[~is_visual])
    return torch.cat(out)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("name", ["eemllm", "llava"])
@pytest.mark.parametrize("seed", LAYOUTS)
def test_equals_plain_llama_under_the_mask(seed, name, kv_heads):
    """Logits, and the gradients of every weight and of the visual tokens."""
    decoder = make_decoder(make(name), num_key_value_heads=kv_heads)
    ids, layout, V = random_layout(seed)
    visual = seeded(V, 32, seed=seed).requires_grad_()
    weight = seeded(len(ids), 50, seed=seed + 1)

    results = []
    for logits in (decoder.logits(decoder(ids, visual, layout)), oracle(decoder, ids, visual, layout, name == "llava")):
        leaves = [visual, *decoder.parameters()]
        grads = torch.autograd.grad((logits * weight).sum(), leaves, allow_unused=True)
        results.append((logits, [torch.zeros_like(p) if g is None else g for p, g in zip(leaves, grads)]))
    (logits, grads), (expected, expected_grads) = results
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    for got, want in zip(grads, expected_grads):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("aligner", ["", "v", "o", "f", "vo", "vf", "of"])
def test_aligner_switches_leave_out_their_line(aligner):
    """Table 6's variants against the equations with that matrix removed, layer by layer."""
    decoder = make_decoder(make("eemllm", aligner=aligner), num_key_value_heads=4)
    full = make_decoder(make("eemllm"), num_key_value_heads=4)
    ids, layout, V = random_layout(0)
    visual = seeded(V, 32)
    layer = decoder.layers[0]
    h = rms_norm(visual, layer.input_layernorm.weight, 1e-5)
    for letter, matrix in (("v", layer.self_attn.v_proj.weight), ("o", layer.self_attn.o_proj.weight)):
        h = h @ matrix.T if letter in aligner else h
    expected = visual + h if aligner.strip("f") else visual
    if "f" in aligner:
        expected = expected + layer.mlp(rms_norm(expected, layer.post_attention_layernorm.weight, 1e-5))
    h = layer.input_layernorm(visual)
    got = layer.align(visual, h, layer.self_attn.v_proj(h).unflatten(-1, (-1, 8)))
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(decoder(ids, visual, layout), full(ids, visual, layout))


@pytest.mark.parametrize("name", ["eemllm", "llava"])
def test_last_layers_visual_rows_stop_at_keys_and_values(name):
    """Nothing reads the visual tokens after them: no query, O or FFN is computed."""
    decoder = make_decoder(make(name))
    ids, layout, V = random_layout(0)
    rows = []
    last = decoder.layers[-1]
    for module in (last.self_attn.q_proj, last.self_attn.o_proj, last.mlp):
        module.register_forward_hook(lambda module, args, out: rows.append(len(args[0])))
    last.self_attn.k_proj.register_forward_hook(lambda module, args, out: rows.append(-len(args[0])))
    decoder(ids, seeded(V, 32), layout)
    assert sum(r for r in rows if r < 0) == -(V + len(ids))
    assert [r for r in rows if r > 0] == [len(ids)] * 3


@pytest.mark.parametrize("name", ["eemllm", "llava"])
def test_a_sample_moves_no_bit_of_another(name):
    """Logits and the gradients that reach a sample's own rows, when another sample's rows change."""
    decoder = make_decoder(make(name)).float()
    ids, layout, V = random_layout(0)
    visual = seeded(V, 32, dtype=torch.float32)
    changed_ids, changed_visual = ids.clone(), visual.clone()
    changed_ids[rows_of(layout.text, 2)] = (ids[rows_of(layout.text, 2)] + 1) % 50
    changed_visual[rows_of(layout.visual, 2)] *= -3
    results = []
    for i, v in ((ids, visual), (changed_ids, changed_visual)):
        v = v.clone().requires_grad_()
        embedded = []
        hook = decoder.embed_tokens.register_forward_hook(lambda m, a, out: embedded.append(out))
        logits = decoder.logits(decoder(i, v, layout))
        hook.remove()
        results.append((logits, *torch.autograd.grad(logits.square().sum(), [v, embedded[0]])))
    for run, before, after in zip((layout.text, layout.visual, layout.text), *results):
        for b in range(layout.num_samples):
            same = torch.equal(before[rows_of(run, b)], after[rows_of(run, b)])
            assert same == (b != 2) or run.length[b] == 0


@pytest.mark.parametrize("name", ["eemllm", "llava"])
@pytest.mark.parametrize("seed", range(6))
def test_cached_equals_uncached(name, seed):
    """A prompt read at once and then token by token gives the rows of one full pass; samples may leave on the way."""
    decoder = make_decoder(make(name))
    from layouts import HAND_MADE, random_samples
    from nanoeemllm.layout import build_layout
    samples, grids = random_samples(seed) if seed else map(list, zip(*HAND_MADE))
    samples, new = [s + [1] for s in samples], torch.randint(50, (len(samples), 5), generator=torch.Generator().manual_seed(seed))
    ids, layout = build_layout(samples, grids)
    visual = seeded(layout.num_visual, 32, seed=seed)
    full_ids, full_layout = build_layout([s + n.tolist() for s, n in zip(samples, new)], grids)
    full = decoder(full_ids, visual, full_layout)

    with torch.no_grad():
        cache = KVCache(decoder.config, layout, 5, torch.float64)
        decoder(ids, visual, layout, cache)
        alive = torch.arange(len(samples))
        for step in range(5):
            if step == 2 and len(alive) > 1:
                cache.select(torch.arange(1, len(alive)))
                alive = alive[1:]
            hidden = decoder.decode(new[alive, step], cache)
            rows = full_layout.text.start[alive] + layout.text.length[alive] + step
            torch.testing.assert_close(hidden, full[rows.long()], rtol=1e-10, atol=1e-10)


def test_llama3_rope_scaling_keeps_fast_turns_and_slows_the_slow():
    from nanoeemllm.llama import rope_frequencies
    plain = LlamaConfig(**{**TINY, "head_dim": 64, "num_key_value_heads": 4, "rope_theta": 5e5})
    scaled = LlamaConfig(**{**TINY, "head_dim": 64, "num_key_value_heads": 4, "rope_theta": 5e5,
                            "rope_scaling": RopeScaling(8.0, 1.0, 4.0, 8192)})
    before, after = rope_frequencies(plain), rope_frequencies(scaled)
    wavelength = 2 * math.pi / before
    torch.testing.assert_close(after[wavelength < 2048], before[wavelength < 2048])
    torch.testing.assert_close(after[wavelength > 8192], before[wavelength > 8192] / 8)
    between = (wavelength > 2048) & (wavelength < 8192)
    assert between.any() and (after < before)[between].all() and (after > before / 8)[between].all()
