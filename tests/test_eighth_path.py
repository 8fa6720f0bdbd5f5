"""An eighth visual path, defined here in one place: it is trained, cached, batched, counted, forecast and listed, and no
other file knows it."""

import dataclasses
from argparse import Namespace
from dataclasses import dataclass

import pytest
import torch

from nanoeemllm.attention import attention
from nanoeemllm.bench.operations import CASES, count, paths_of, relative
from nanoeemllm.border.command import Parser
from nanoeemllm.border.typed import read_config
from nanoeemllm.config import IMAGE_TOKEN as IMAGE
from nanoeemllm.config import PRESETS, VisualPath, size
from nanoeemllm.data import collate, cost
from nanoeemllm.decoder import DecoderLayer, LlavaLayer
from nanoeemllm.model import EEMLLM
from nanoeemllm.paths import PATHS, add_flags, from_args, layer_numbers, make, register
from nanoeemllm.training.config import PAPER, freeze
from nanoeemllm.training.forecast import forecast
from nanoeemllm.weights.initialize import initialize
from test_model import SAMPLES, picture


@pytest.fixture(autouse=True)
def frozen():
    """The path: in some layers visual tokens stay as they are, and their keys and values serve the text; else llava."""

    class FrozenLayer(DecoderLayer):
        def forward(self, x, ctx):
            text, a = x[:ctx.T], self.self_attn
            h = self.input_layernorm(x)
            keys = ctx.keys(self.index, *a.keys_values(h, ctx.rope))
            heads = attention(a.queries(h[:ctx.T], ctx.rope_text), keys, ctx.sees)
            text = self.feed_forward(text + a.o_proj(heads.flatten(1)))
            return text if self.is_last else torch.cat([text, x[ctx.T:]])

    @register
    @dataclass(frozen=True)
    class Frozen(VisualPath):
        name = "frozen"
        frozen_layers: tuple[int, ...] = size((1,), least=0, most=1000, parse=layer_numbers, metavar="LAYERS",
                                              help="that leave visual tokens as they are")

        def layer(self, llama, index, feature_width):
            return (FrozenLayer if index in self.frozen_layers else LlavaLayer)(llama, index)

    yield
    del PATHS["frozen"]


def model_of(**settings) -> EEMLLM:
    torch.manual_seed(0)
    model = EEMLLM(dataclasses.replace(PRESETS["tiny"], visual_path=make("frozen", **settings)))
    initialize(model)
    return model


def test_it_is_trained():
    model, batch = model_of(), collate(SAMPLES)
    freeze(model, "finetune")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(8):
        losses.append(model(batch))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.8 * losses[0]


def test_visual_tokens_stay_where_they_are_frozen():
    """All layers frozen: every layer has the keys of the same visual tokens; eemllm without its aligner is the same."""
    model = model_of(frozen_layers=(0, 1, 2)).double()
    twin = EEMLLM(dataclasses.replace(model.config, visual_path=make("eemllm", aligner=""))).double()
    twin.load_state_dict(model.state_dict())
    ids, images = [3, IMAGE, 4, 5], [picture(1)]
    torch.testing.assert_close(model.logits(ids, images), twin.logits(ids, images))


def test_it_is_cached_and_batched():
    model = model_of().double()
    prompts = [[1, IMAGE, 5, 6], [7, 8], [IMAGE, 3, IMAGE, 9]]
    images = [[picture(1)], [], [picture(2, 30, 48), picture(3)]]
    together = model.generate_batch(prompts, images, max_new_tokens=6)
    for ids, own, answer in zip(prompts, images, together):
        assert list(model.generate(ids, own, max_new_tokens=6)) == answer
        for n, token in enumerate(answer):                     # without the cache: the whole row anew
            assert model.logits(ids + answer[:n], own)[-1].argmax() == token


def test_it_is_counted_forecast_and_listed():
    """Between eemllm without its aligner, where visual tokens stay in every layer, and llava."""
    config = PRESETS["tiny"]
    arguments = Parser("test")
    add_flags(arguments)
    path = from_args(arguments.parse_args(["--visual-path", "frozen", "--frozen-layers", "0-1"]), config)
    assert path == make("frozen", frozen_layers=(0, 1))

    paths = {"all": make("eemllm", aligner=""), "two": path, "one": make("frozen"), "llava": make("llava")}
    configs = {name: dataclasses.replace(config, visual_path=path) for name, path in paths.items()}
    assert read_config(configs["two"].to_dict()) == configs["two"]
    work = {name: cost.operations(its, [(32, [36])])[0] for name, its in configs.items()}
    assert work["all"] == work["two"] < work["one"] < work["llava"]          # no path carries on the last layer's
    steps = {name: cost.step(its, [(32, [36])], "finetune", False, 8) for name, its in configs.items()}
    assert steps["two"][0] < steps["one"][0] < steps["llava"][0] and steps["two"][1] < steps["one"][1] < steps["llava"][1]
    args = Namespace(gpus=1, mfu=0.5, micro_batch_tokens=512, checkpoint_activations=False)
    lines = list(forecast(configs["one"], PAPER["finetune"], [32, 8, 36], args))
    assert "visual path frozen" in lines[0]

    listed = paths_of(arguments.parse_args([]), config)
    counts = count(config, listed, CASES[:1], rectangles=True)
    assert counts["naavit"][0][0] < counts["frozen"][0][0] < counts["llava"][0][0]
    assert "frozen" in [row["tokens"] for row in relative(counts, CASES[:1], parts=1)]
