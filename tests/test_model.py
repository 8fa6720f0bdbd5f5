"""Batch, loss, logits and answers of the whole model."""

import dataclasses
import random

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from layouts import random_layout, rows_of, seeded
from nanoeemllm.config import IMAGE_TOKEN, PRESETS, UserError
from nanoeemllm.weights.initialize import initialize
from nanoeemllm.data import Sample
from nanoeemllm.data.images import prepare_image
from nanoeemllm.layout import build_layout
from nanoeemllm.data import collate
from nanoeemllm.model import EEMLLM
from nanoeemllm.paths import make
from nanoeemllm.vision import VisionTransformer, position_index


def make_model(path="eemllm", dtype=torch.float64) -> EEMLLM:
    torch.manual_seed(0)
    tiny = PRESETS["tiny"]
    model = EEMLLM(dataclasses.replace(tiny, visual_path=make(path),
                                       llama=dataclasses.replace(tiny.llama, num_hidden_layers=2),
                                       vision=dataclasses.replace(tiny.vision, num_hidden_layers=1)))
    initialize(model)
    return model.to(dtype)


@pytest.mark.parametrize("path", [make("eemllm"), make("flamingo", every=1)], ids=["eemllm", "flamingo"])
def test_initialize_sets_every_parameter(path):
    """What has no values yet gets all of them: norms 1 and gates 0, as in a model that was made in memory."""
    config = dataclasses.replace(PRESETS["tiny"], visual_path=path)
    made, model = EEMLLM(config), EEMLLM(config)
    for p in model.parameters():
        p.data.fill_(torch.nan)
    initialize(model)
    for (name, p), usual in zip(model.named_parameters(), made.parameters()):
        assert p.isfinite().all() and (p.dim() > 1 or name.endswith("bias") or torch.equal(p, usual)), name


def picture(seed: int, width: int = 48, height: int = 48) -> Image.Image:
    return Image.frombytes("RGB", (width, height), random.Random(seed).randbytes(width * height * 3))


def make_sample(key: str, ids: list[int], learned: str, *pictures: Image.Image) -> Sample:
    vision = PRESETS["tiny"].vision
    return Sample(ids, [c == "#" for c in learned], [prepare_image(p, vision) for p in pictures], key)


SAMPLES = [
    make_sample("a", [1, IMAGE_TOKEN, 5, 6, 7], "...##", picture(1)),
    make_sample("b", [1, 8, 9], ".##"),
    make_sample("c", [3, IMAGE_TOKEN, 4, IMAGE_TOKEN, 5, 2], "..#.##", picture(2), picture(3, 30, 48)),
    make_sample("d", [7], "#"),
]


def test_positions_count_every_token_of_a_picture():
    ids, layout = build_layout([[1, 2, IMAGE_TOKEN, 3], [4]], [[(1, 3)], []])
    assert ids.tolist() == [1, 2, 3, 4]
    assert layout.position.tolist() == [0, 1, 5, 0, 2, 3, 4]                # text rows first
    assert layout.text.length.tolist() == [3, 1] and layout.visual.length.tolist() == [3, 0]


@pytest.mark.parametrize("seed", range(12))
def test_prefix_lengths_are_the_rule_by_positions(seed):
    """Of every row of both kinds: how many keys of its sample have a position <= its own."""
    _, layout, _ = random_layout(seed)
    T = layout.num_text
    for b in range(layout.num_samples):
        t = rows_of(layout.text, b)
        v = slice(*(T + bound for bound in (rows_of(layout.visual, b).start, rows_of(layout.visual, b).stop)))
        for row in [*range(t.start, t.stop), *range(v.start, v.stop)]:
            assert layout.sees_text[row] == (layout.position[t] <= layout.position[row]).sum()
            assert layout.sees_visual[row] == (layout.position[v] <= layout.position[row]).sum()
    for image in layout.images:
        first = layout.position[T + image.rows.start]
        assert (layout.position[image.before] < first).all() and (layout.position[image.after] > first).all()


def test_more_or_fewer_pictures_than_images_is_an_error():
    with pytest.raises(UserError, match="2 <image> in the text but 1 picture"):
        build_layout([[IMAGE_TOKEN, 1, IMAGE_TOKEN]], [[(1, 1)]])


def test_a_rows_target_is_the_token_behind_it_and_none_over_a_border():
    """Not over a picture, where a visual row would have to say it; not over the end of a sample."""
    batch = collate(SAMPLES)
    assert batch.ids.tolist() == [1, 5, 6, 7, 1, 8, 9, 3, 4, 5, 2, 7]
    assert batch.target_rows.tolist() == [1, 2, 4, 5, 9] and batch.targets.tolist() == [6, 7, 8, 9, 2]
    assert batch.keys == ["a", "b", "c", "d"] and len(batch.layout.grids) == 3


@pytest.mark.parametrize("path", ["eemllm", "llava"])
def test_packed_loss_and_gradients_equal_one_sample_at_a_time(path):
    model = make_model(path)
    results = []
    for groups in ([SAMPLES], [[s] for s in SAMPLES]):
        model.zero_grad()
        loss = sum(model(collate(group)) for group in groups)
        loss.backward()
        results.append((loss.detach(), {n: p.grad for n, p in model.named_parameters()}))
    torch.testing.assert_close(results[0][0], results[1][0])
    for name, grad in results[0][1].items():
        torch.testing.assert_close(grad, results[1][1][name], rtol=1e-7, atol=1e-11, msg=name)


def test_loss_is_the_cross_entropy_of_the_logits_method():
    model = make_model()
    sample, image = SAMPLES[0], picture(1)
    expected = F.cross_entropy(model.logits(sample.ids, [image])[1:3], torch.tensor([6, 7]), reduction="sum")
    torch.testing.assert_close(model(collate([sample])).detach(), expected)


@pytest.mark.parametrize("path", ["eemllm", "llava"])
def test_answers_in_a_batch_are_those_one_by_one_with_a_stop_each(path):
    model = make_model(path, torch.float32)
    prompts = [[1, IMAGE_TOKEN, 5], [2, 3, 4, 5, 6], [IMAGE_TOKEN, 7, IMAGE_TOKEN, 8]]
    images = [[picture(1)], [], [picture(2), picture(3, 24, 40)]]
    single = [list(model.generate(p, i, max_new_tokens=12)) for p, i in zip(prompts, images)]
    assert all(len(answer) == 12 for answer in single)
    assert model.generate_batch(prompts, images, max_new_tokens=12) == single
    stop = {single[0][4], single[1][7]}
    cut = [next((answer[:i] for i, token in enumerate(answer) if token in stop), answer) for answer in single]
    assert model.generate_batch(prompts, images, max_new_tokens=12, stop_ids=stop) == cut
    for prompt, pictures, answer in zip(prompts, images, single):        # each the likeliest after all before it
        for n in range(12):
            assert model.logits(prompt + answer[:n], pictures)[-1].argmax() == answer[n]


@pytest.mark.parametrize("ids, images, what", [
    ([], [], "is empty"), ([1, IMAGE_TOKEN], [picture(0)], "ends in <image>"), ([1, IMAGE_TOKEN, 2], [], "1 <image>"),
    ([1] * 3000, [], "do not fit the model's context of 2048")])
def test_prompts_that_cannot_be_answered(ids, images, what):
    with pytest.raises(UserError, match=what):
        list(make_model(dtype=torch.float32).generate(ids, images))


def test_a_model_without_vision_reads_text_alone():
    model = EEMLLM(dataclasses.replace(PRESETS["tiny"], vision=None))
    assert not any(n.startswith(("vision", "projector")) for n in model.state_dict())
    assert len(list(model.generate([1, 2], max_new_tokens=3))) == 3
    with pytest.raises(UserError, match="no image encoder"):
        model.logits([1, IMAGE_TOKEN, 2], [picture(0)])


@pytest.mark.parametrize("changes", [{}, dict(architecture="clip", resize="square", hidden_act="quick_gelu", patch_size=6,
                                              post_layernorm=False, image_size=24)])
def test_pictures_together_are_seen_as_alone(changes):
    config = dataclasses.replace(PRESETS["tiny"].vision, num_hidden_layers=2, **changes)
    torch.manual_seed(0)
    vision = VisionTransformer(config).double()
    sizes = [(4, 4)] * 3 if changes else [(8, 8), (1, 5), (3, 2), (1, 1)]
    patches = [seeded(h * w, config.patch_dim, seed=i) for i, (h, w) in enumerate(sizes)]
    together = vision(torch.cat(patches), sizes)
    torch.testing.assert_close(together, torch.cat([vision(p, [s]) for p, s in zip(patches, sizes)]))
    assert len(vision(patches[0][:0], [])) == 0


def test_a_patch_takes_the_position_at_its_fraction_of_the_side():
    assert position_index([(4, 4)], 4).tolist() == list(range(16))
    assert position_index([(2, 3)], 70).tolist() == [r * 70 + c for r in (0, 35) for c in (0, 23, 46)]


def test_images_and_ids_come_as_a_user_has_them(tmp_path):
    from nanoeemllm.weights.tokenizer import Tokenizer
    from nanoeemllm.toy.world import make_tokenizer
    model = make_model(dtype=torch.float32)
    model.tokenizer = Tokenizer(make_tokenizer())
    picture(1).save(tmp_path / "a.png")
    text = "what is it ? <image> cat"
    expected = model.logits(model.encode(text), [picture(1)])
    assert torch.equal(model.logits(text, [tmp_path / "a.png"]), expected)
    with open(tmp_path / "a.png", "rb") as file:
        assert torch.equal(model.logits(text, [file]), expected)
    for ids, images, what in ((7, [], "a string or a list"), ([1, "x"], [], "a string or a list"),
                              (text, [3], "a PIL image, a path"), (text, "a.png", "must be a list")):
        with pytest.raises(UserError, match=what):
            model.logits(ids, images)
