"""Data: what is read, what is refused, who gets which sample, and that none is lost or seen twice."""

import contextlib
import dataclasses
import json
import math
import multiprocessing
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer as Words, models, pre_tokenizers

from nanoeemllm.config import IMAGE_TOKEN, PRESETS, UserError, VisionConfig
from nanoeemllm.data import ConversationFile, Encoder, Mixture, Plan, conversations, load_batches, open_mixture
from nanoeemllm.data.packing import assign_to_ranks, patch_grid
from nanoeemllm.data.images import prepare_image
from nanoeemllm.weights.tokenizer import Tokenizer
from nanoeemllm.data.cost import sample_cost

VISION = VisionConfig(patch_size=4, image_size=32, min_image_size=8, resize="native")


def turns(*values):
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


def picture_entry(i, name="a.png", rounds=1):
    return {"id": f"s{i}", "image": name,
            "conversations": turns("<image>\nwhat is it", "a cat", *["and then", "a dog ran"] * (rounds - 1))}


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    for name, size in (("a.png", (24, 16)), ("sub/b.jpg", (16, 60)), ("grüße.png", (9, 9))):
        Image.new("RGB", size, "red").save(folder / name)
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "elsewhere" / "secret.png").write_bytes(b"")
    (folder / "link").symlink_to(tmp_path / "elsewhere" / "deep")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    return folder


@pytest.fixture
def tokenizer():
    words = "<unk> <s> </s> USER : ASSISTANT what is it a cat and then dog ran".split()
    inner = Words(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return Tokenizer(inner)


def write(path, entries, lines=False, **options):
    text = "\n".join(json.dumps(e, **options) for e in entries) if lines else json.dumps(entries, **options)
    path.write_text(text, encoding="utf-8")
    return path


# ---- reading ----

@pytest.mark.parametrize("options", [{"lines": True}, {}, {"indent": 2}, {"ensure_ascii": False}])
def test_reads_what_json_reads(tmp_path, images, monkeypatch, options):
    monkeypatch.setattr(conversations, "CHUNK", 997)               # every object meets a chunk's end sooner or later
    entries = [picture_entry(i, ["a.png", "grüße.png"][i % 2]) | {"extra": {"nested": ["}", "\\\"", i, None]}}
               for i in range(50)]
    entries += [{"id": 7, "conversations": turns("东京 naïve", "\u00e9 \U0001f600")}]
    source = ConversationFile(write(tmp_path / "d.json", entries, **options), images)
    assert len(source) == 51 and source.problems == []
    for i, entry in enumerate(entries):
        names = [entry["image"]] if "image" in entry else []
        assert source[i] == entry | {"id": str(entry["id"]), "image": [str(images / name) for name in names]}


def test_reads_a_list_with_byte_order_mark_and_a_sample_without_id(tmp_path):
    path = tmp_path / "d.json"
    path.write_bytes(b"\xef\xbb\xbf \n" + json.dumps([{"conversations": turns("a", "b")}]).encode())
    assert ConversationFile(path)[0]["id"] == "d.json:1"


BAD = {
    'no "conversations"': [1],
    'a list of turns': {"id": "x"},
    'turns with "from" and "value"': {"id": "x", "conversations": [{"from": "human"}, *turns("a", "b")[1:]]},
    "roles out of order": {"id": "x", "conversations": turns("a", "b")[::-1]},
    "gpt last": {"id": "x", "conversations": turns("a", "b", "c")},
    "an empty answer": {"id": "x", "conversations": turns("a", " \n")},
    "<image> in an answer": {"id": "x", "image": "a.png", "conversations": turns("a", "<image>")},
    '1 <image> in the text but 0 in "image"': {"id": "x", "conversations": turns("<image> a", "b")},
    '0 <image> in the text but 1 in "image"': {"id": "x", "image": "a.png", "conversations": turns("a", "b")},
    '1 <image> in the text but 2 in "image"': {"id": "x", "image": ["a.png", "a.png"],
                                               "conversations": turns("<image>", "b")},
    "that is no path": picture_entry(0, [7]),
    "'../a.png' is outside of the image folder": picture_entry(0, "../a.png"),
    "'sub/../../a.png' is outside of the image folder": picture_entry(0, "sub/../../a.png"),
    "'/etc/hostname' is outside of the image folder": picture_entry(0, "/etc/hostname"),
    "'link/../secret.png' is outside of the image folder": picture_entry(0, "link/../secret.png"),
    "'none.png' does not exist": picture_entry(0, "none.png"),
}


@pytest.mark.parametrize("reason", BAD)
@pytest.mark.parametrize("lines", [True, False])
def test_index_reports_what_cannot_be_used(tmp_path, images, reason, lines):
    good = [picture_entry(0), picture_entry(1, "sub/../sub/b.jpg")]
    source = ConversationFile(write(tmp_path / "d.json", [good[0], BAD[reason], good[1]], lines), images)
    (where, problem), = source.problems
    assert reason in problem and [source[i]["id"] for i in range(len(source))] == ["s0", "s1"]
    assert where == ("line 2" if lines else f"id {BAD[reason]['id']}" if isinstance(BAD[reason], dict) else "entry 2")


def test_a_broken_line_is_reported_and_ten_are_listed(tmp_path, images, capsys):
    path = write(tmp_path / "d.jsonl", [picture_entry(i) for i in range(3)], lines=True)
    path.write_text(path.read_text() + "\n" + '{"id": "half", "conv\n' * 14)
    data = open_mixture([str(path)], str(images), max_bad=0.9)
    report = capsys.readouterr().err.splitlines()
    assert len(data) == 3
    assert "14 of 17 conversations cannot be used" in report[0] and report[1].startswith("  line 4: not valid JSON")
    assert len(report) == 12 and report[-1] == "  ... and 4 more"


@pytest.mark.parametrize("content, message", [
    ("", "neither a JSON list"), ("7", "neither a JSON list"), ('{\n "id": 1\n}', "neither a JSON list"),
    ('{"data": []}', 'not one conversation that can be used (line 1: no "conversations", a list of turns'),
    ("[]", "not one conversation that can be used"),
    ('[{"conversations": []}, {"conv', "conversation 2, at byte 24, is not valid JSON"),
    ('[{"a": 1}, {]]' + " " * 3000, "conversation 2, at byte 11"), ('[{"a": 1}', "is the file whole?")])
def test_files_that_are_no_conversations_stop_at_once(tmp_path, content, message):
    path = tmp_path / "d.json"
    path.write_text(content)
    with pytest.raises(UserError) as error:
        ConversationFile(path)
    assert message in str(error.value) and "d.json" in str(error.value) and "\n" not in str(error.value)


def test_missing_file_folder_or_weight_say_so(tmp_path, images):
    path = write(tmp_path / "d.json", [picture_entry(0), {"id": "t", "conversations": turns("a", "b")}])
    with pytest.raises(UserError, match="no such file"):
        ConversationFile(tmp_path / "none.json")
    with pytest.raises(UserError, match="no such folder"):
        ConversationFile(path, tmp_path / "none")
    with pytest.raises(UserError, match="weight above 0"):
        open_mixture([f"{path}:0.3", str(path)], str(images))
    assert "give --images" in ConversationFile(path).problems[0][1]
    assert open_mixture([f"{path}:1", f"{path}:3"], str(images)).counts == [1, 3]


# ---- encoding ----

def test_sample_from_file_and_from_picture_are_the_same(tmp_path, images, tokenizer):
    source = ConversationFile(write(tmp_path / "d.json", [picture_entry(0, "sub/b.jpg", rounds=3)]), images)
    sample = Encoder(tokenizer, "vicuna_v1", VISION, 500)(source[0])
    with Image.open(images / "sub/b.jpg") as picture:
        same = Encoder(tokenizer, "vicuna_v1", VISION, 500)(source[0] | {"image": picture})
    assert (sample.ids, sample.loss_mask, sample.key, sample.cut) == (same.ids, same.loss_mask, "s0", False)
    assert torch.equal(sample.images[0][0], same.images[0][0]) and sample.images[0][1] == same.images[0][1] == (8, 2)
    assert Encoder(tokenizer, "vicuna_v1", VISION, 500).count(source[0]) == (len(sample.ids) - 1, 16)


def test_long_samples_are_cut_after_an_answer(images, tokenizer):
    picture = Image.new("RGB", (16, 16))                                                     # 16 visual tokens
    entry = {"id": "x", "image": [picture, picture],
             "conversations": turns("<image> a", "a cat", "a", "a dog", "<image>", "a")}
    lengths = []
    for rounds in (1, 2, 3):
        cut = entry | {"image": [picture] * (1 + rounds // 3), "conversations": entry["conversations"][:2 * rounds]}
        whole = Encoder(tokenizer, "vicuna_v1", VISION, 10 ** 6)(cut)
        lengths.append(len(whole.ids) + 15 * len(whole.images))
        for most in (lengths[-1], lengths[-1] + 1):
            sample = Encoder(tokenizer, "vicuna_v1", VISION, most)(entry)
            assert sample.ids == whole.ids and sample.loss_mask == whole.loss_mask and sample.cut == (rounds < 3)
            assert len(sample.images) == sample.ids.count(IMAGE_TOKEN) == (2 if rounds == 3 else 1)
    assert len(Encoder(tokenizer, "vicuna_v1", VISION, lengths[2] - 1)(entry).images) == 1  # never half a picture
    with pytest.raises(UserError, match="first question and answer alone"):
        Encoder(tokenizer, "vicuna_v1", VISION, lengths[0] - 1)(entry)
    with pytest.raises(UserError, match="no image encoder"):
        Encoder(tokenizer, "vicuna_v1", None, 500)(entry)


@pytest.mark.parametrize("resize", ["native", "square", "pad"])
def test_patch_grid_foretells_prepare_image(tmp_path, resize):
    vision = VisionConfig(patch_size=4, image_size=34, min_image_size=10, resize=resize)
    rng = np.random.default_rng(0)
    for i in range(30):
        picture = Image.new("RGB", tuple(rng.integers(1, 90, 2).tolist()))
        exif = picture.getexif()
        exif[0x0112] = i % 8 + 1                                                             # lying, mirrored, ...
        path = str(tmp_path / ("x.jpg" if i % 3 else "x.png"))
        picture.save(path, exif=exif)
        with Image.open(path) as read:
            assert patch_grid(path, vision) == prepare_image(read, vision)[1]


# ---- order ----

class Numbers:
    """A source of conversations that are numbers."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        assert 0 <= i < self.length
        return {"id": f"{self.length}-{i}", "conversations": turns("a " * (i % 7), "a cat")}


def test_mixture_takes_every_sample_once_and_weights_rule_the_shares():
    plain = Mixture([Numbers(30), Numbers(70)])
    assert sorted(plain.order(1, 0)) == sorted(plain.order(1, 5)) == list(range(100))
    assert not np.array_equal(plain.order(1, 0), plain.order(1, 1)) and not np.array_equal(plain.order(1, 0),
                                                                                           plain.order(2, 0))
    assert plain[29]["id"] == "30-29" and plain[30]["id"] == "70-0"
    mixed = Mixture([Numbers(30), Numbers(70)], [3, 1])
    assert mixed.counts == [75, 25]
    seen = np.concatenate([mixed.order(0, epoch) for epoch in range(14)])
    times = np.bincount(seen, minlength=100)
    assert (times[:30] == 35).all() and (times[30:] == 5).all()            # 14 x 75 = 35 laps of 30, 14 x 25 = 5 of 70
    short = np.bincount(mixed.order(0, 0), minlength=100)
    assert set(short[:30]) == {2, 3} and short[30:].max() == 1


@pytest.mark.parametrize("length, batch_size", [(1000, 16), (103, 10), (7, 16), (2113, 32), (130, 128)])
def test_plan_is_the_same_for_any_number_of_processes_and_from_any_step(length, batch_size):
    cost = lambda conversation: len(conversation["conversations"][0]["value"]) + 1.0
    plan = Plan(Mixture([Numbers(length)]), batch_size, seed=3, cost=cost, budget=20)
    steps = plan.steps_per_epoch
    whole = {step: indices.tolist() for step, indices, _ in plan.steps(0, 2 * steps)}
    assert list(whole) == list(range(2 * steps))
    for epoch in range(2):                                                 # nothing twice, nothing missed
        assert sorted(sum((whole[s] for s in range(epoch * steps, (epoch + 1) * steps)), [])) == list(range(length))
    for world in (1, 2, 4):
        got = {step: [] for step in whole}
        shape = [[], []]
        for rank in range(world):
            micro_batches = list(plan.micro_batches(0, 2 * steps, rank, world))
            shape[rank > 0] = [(m.step, m.last) for m in micro_batches]
            assert shape[0] == shape[rank > 0] and all(m.indices for m in micro_batches)   # all ranks march in step
            for m in micro_batches:
                got[m.step] += m.indices
        assert {step: sorted(g) for step, g in got.items()} == {step: sorted(w) for step, w in whole.items()}
    for start in {0, 1, steps // 2, steps, 2 * steps - 1}:
        assert {step: i.tolist() for step, i, _ in plan.steps(start, 2 * steps)} == {
            step: whole[step] for step in range(start, 2 * steps)}


def paper_costs(rng, config, count):
    """47% text alone, log-normal lengths; 53% with a picture, and with one in five of those another size."""
    cost = sample_cost(config)
    text = rng.lognormal(5.5, 0.8, count).clip(20, 3000).astype(int)
    visual = np.where(rng.random(count) < 0.2, 70 * rng.integers(27, 70, count), 4900)
    return np.array([cost(int(t), int(v) if rng.random() < 0.53 else 0) for t, v in zip(text, visual)])


@pytest.mark.parametrize("world", [2, 4, 8, 16])
def test_ranks_work_alike_on_the_papers_mix(world):
    """On text alone and 980-px pictures: ranks within 5% of each other, budgets kept and well filled."""
    costs = paper_costs(np.random.default_rng(0), PRESETS["eemllm-7b-980"], 40 * 128)

    class Plain(Numbers):
        def __getitem__(self, i):
            return i
    plan = Plan(Mixture([Plain(len(costs))]), 128, seed=0, cost=costs.__getitem__, budget=16384)
    work, waiting, fill = [], [], []
    for _, indices, step_costs in plan.steps(0, 40):
        assert np.array_equal(step_costs, costs[indices])
        micro_batch_of, rank_of = assign_to_ranks(step_costs, world, 16384)
        dealt = np.zeros((micro_batch_of.max() + 1, world))
        np.add.at(dealt, (micro_batch_of, rank_of), step_costs)
        work.append(1 - dealt.sum(0).min() / dealt.sum(0).max())
        waiting.append(1 - dealt.mean() / dealt.max(1).mean())             # ranks meet at every micro-batch
        fill.append(dealt.mean() / 16384)
        assert dealt.max() <= 16384 or len(dealt) == 128 // world
    print(f"{world} ranks: work differs by {np.mean(work):.2%} (worst step {max(work):.2%}), waiting "
          f"{np.mean(waiting):.2%}, budget filled {np.mean(fill):.1%}")
    assert np.mean(work) <= 0.05 and np.mean(waiting) <= 0.05
    assert np.quantile(work, 0.9) <= 0.05


def test_too_few_samples_for_the_processes():
    with pytest.raises(UserError, match="larger --batch-size"):
        assign_to_ranks(np.ones(3), 4, None)


def test_odd_entries_of_a_list_are_told_and_left_out(tmp_path):
    """Bytes that are no UTF-8, and a picture named before the first question."""
    good = json.dumps({"id": "a", "conversations": turns("hi", "ho")}).encode()
    early = json.dumps({"id": "b", "conversations": [{"from": "system", "value": "<image>"}, *turns("hi", "ho")]}).encode()
    latin = '{"id": "c", "image": "café.png", "conversations": []}'.encode("latin-1")
    (tmp_path / "d.json").write_bytes(b"[" + b",".join([good, early, latin, good]) + b"]")
    file = ConversationFile(tmp_path / "d.json", progress=False)
    assert len(file) == 2 and [key for key, _ in file.problems] == ["id b", "entry 3"]
    assert "before the first question" in file.problems[0][1] and "not valid JSON" in file.problems[1][1]


@pytest.mark.parametrize("argument, message", [("", "'': no such file"), ("x.json:1e400", "--data")])
def test_data_arguments_that_name_nothing(argument, message):
    with pytest.raises(UserError, match=message):
        open_mixture([argument], None)


def test_token_cost_counts_the_work_of_the_paths():
    """By hand: C = 128, F = 384, H D = 128, G D = 64, FFN 3 C F a row; 4 layers, the last of which does not align. In
    weights, of which a pair of query and key in all heads takes 2 H D; the frozen encoder counts a third."""
    tiny = PRESETS["tiny"]
    config = dataclasses.replace(tiny, llama=dataclasses.replace(tiny.llama, intermediate_size=384, num_hidden_layers=4,
                                                                 num_key_value_heads=2))
    row, pair = 128 * (128 + 64 + 64 + 128) + 3 * 128 * 384, 2 * 128
    assert sample_cost(config)(1, 0) == pytest.approx(1)
    text = 4 * (10 * row + pair * (10 * 11 / 2 + 10 * 64))
    visual = 64 * (4 * 2 * 128 * 64 + 3 * (128 * 128 + 3 * 128 * 384) + 128 * (128 + 128))
    encoder = 64 * 192 * 128 + 3 * (64 * (4 * 128 ** 2 + 2 * 128 * 384) + pair * 64 ** 2)
    assert sample_cost(config)(10, 64) == pytest.approx((text + visual + encoder / 3) / (4 * (row + pair)))


# ---- loading ----

@pytest.fixture
def world(tmp_path, images, tokenizer):
    entries = [picture_entry(i, ["a.png", "sub/b.jpg"][i % 2]) if i % 3 else
               {"id": f"s{i}", "conversations": turns("a " * (i // 4), "a cat", *["what", "a dog"] * (i // 6))} for i in range(60)]
    entries[10]["image"] = entries[11]["image"] = "broken.png"
    data = Mixture([ConversationFile(write(tmp_path / "d.json", entries), images)])
    encode = Encoder(tokenizer, "vicuna_v1", VISION, 75)
    cost = lambda conversation: sample_cost(PRESETS["tiny"])(*encode.count(conversation))
    return data, cost, encode


def test_loader_gives_the_same_batches_for_any_number_of_workers_and_reports_the_broken(world):
    data, cost, encode = world
    torch.manual_seed(0)
    random_state = torch.get_rng_state()
    runs = []
    for workers in (0, 2):
        runs.append(list(load_batches(Plan(data, 12, 0, cost, budget=400, workers=workers), encode, 0, 5)))
        assert sum(packed.waited for packed in runs[-1]) > 0
    for one, other in zip(*runs, strict=True):
        for name in ("step", "last", "keys", "bad", "cut"):
            assert getattr(one, name) == getattr(other, name)
        for field in ("ids", "patches", "target_rows", "targets"):
            assert torch.equal(getattr(one.batch, field), getattr(other.batch, field))
        assert one.batch.layout.grids == other.batch.layout.grids
    run = runs[0]
    bad = dict(sum((packed.bad for packed in run), []))
    assert set(bad) == {"s10", "s11"} and all("not a picture" in reason for reason in bad.values())
    assert sorted(sum((packed.keys for packed in run), [])) == sorted({f"s{i}" for i in range(60)} - set(bad))
    assert [packed.step for packed in run if packed.last] == list(range(5)) and len(run) > 5
    assert 0 < sum(packed.cut for packed in run) < 20
    assert torch.equal(torch.get_rng_state(), random_state)                # training's own random numbers are untouched


def test_a_micro_batch_of_broken_samples_alone_still_has_a_row(world):
    data, cost, encode = world

    def refuse(conversation):
        raise KeyError("picture")
    packed = next(iter(load_batches(Plan(data, 4, 0), refuse, 0, 1)))
    assert len(packed.bad) == 4 and packed.bad[0][1] == "KeyError: 'picture'"
    assert packed.keys == [] and len(packed.batch.ids) == 1 and len(packed.batch.targets) == 0


def test_real_tokens_are_all_there_is(world):
    """No padding: the rows of a batch are the tokens of its samples."""
    data, cost, encode = world
    for packed in load_batches(Plan(data, 12, 0, cost), encode, 0, 5):
        samples = [encode(data[i]) for i in range(len(data)) if data[i]["id"] in packed.keys]
        assert len(packed.batch.ids) == sum(len(s.ids) - len(s.images) for s in samples)
        assert len(packed.batch.patches) == sum(math.prod(grid) for s in samples for _, grid in s.images)
        assert len(packed.batch.targets) == sum(map(sum, (s.loss_mask for s in samples)))


# ---- processes ----

def test_a_loader_ends_its_processes_and_no_others_and_only_its_parent_ends_them(world):
    data, cost, encode = world
    other = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    other.start()
    with contextlib.closing(load_batches(Plan(data, 12, 0, cost, budget=400, workers=2), encode, 0, 5)) as batches:
        first = next(batches)
        workers = [child for child in multiprocessing.active_children() if child is not other]
        assert len(workers) == 3                                       # two that pack, one that measures costs
        subprocess.run(["kill", "-TERM", *(str(worker.pid) for worker in workers)])
        subprocess.run(["kill", "-INT", *(str(worker.pid) for worker in workers)])
        assert first.step == 0 and sum(packed.last for packed in [first, *batches]) == 5
    with contextlib.closing(load_batches(Plan(data, 12, 0, cost, budget=400, workers=2), encode, 0, 5)) as batches:
        next(batches)
    deadline = time.time() + 20
    while multiprocessing.active_children() != [other] and time.time() < deadline:
        time.sleep(0.01)
    assert multiprocessing.active_children() == [other]
    other.kill()
    other.join()


FORGETFUL = """
import atexit, signal
before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)]
from nanoeemllm.data import Mixture, Plan, Sample, load_batches
assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)]
data = Mixture([[{"id": "a"}] * 1000])
batches = load_batches(Plan(data, 10, 0, workers=2), lambda conversation: Sample([1, 2], [False, True], [], "a"), 0, 100)
print(next(batches).keys[0])
"""


def test_importing_changes_no_signal_and_a_forgotten_loader_ends_with_its_program():
    done = subprocess.run([sys.executable, "-c", FORGETFUL], cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "a\n"), done.stderr
