"""The training loop on one process: what is learned, and that nothing is lost, whatever happens."""

import itertools
import json
import os
import random
import resource
import shutil
import signal
import time

import pytest
import torch
from torch import nn

from nanoeemllm.weights import folder as weights
from nanoeemllm.config import IMAGE_TOKEN, UserError
from nanoeemllm.data import Packed, Sample, load_batches
from nanoeemllm.data import collate
from nanoeemllm.paths import make
from nanoeemllm.training.config import TrainConfig, learning_rate
from nanoeemllm.training.run_folder import RunFolder
from nanoeemllm.training.step import Stopped
from test_border import killed_at
from train import accumulate, mean_loss
from tiny_run import (ALONE, Talks, encode, gradients, in_processes, metrics, start, tensors, tiny_config, tiny_model,
                      tiny_plan, tiny_run)


# ---- gradients ----

@pytest.mark.parametrize("path, settings", [("eemllm", {}), ("llava", {}), ("flamingo", {"every": 2})])
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_gradients_equal_an_unpacked_loop_in_float64(stage, path, settings):
    """A sample at a time, its loss written out over all of its logits."""
    packed = list(load_batches(tiny_plan(budget=3), encode, 0, 1))
    model = tiny_model(path, stage, **settings).double()
    seen, *_ = accumulate(model, packed, backward=True)
    found = {name: grad / seen["targets"] for name, grad in gradients(model).items()}

    slow = tiny_model(path, stage, **settings).double()
    total, count = 0.0, 0
    for key in (key for p in packed for key in p.keys):
        sample = encode(Talks(64)[int(key.removeprefix("talk-"))])
        batch = collate([sample])
        hidden = slow.decoder(batch.ids, slow.visual_tokens(batch.patches, batch.layout.grids), batch.layout)
        log_p = slow.decoder.logits(hidden).log_softmax(-1)
        words = [(i, learned) for i, learned in zip(sample.ids, sample.loss_mask) if i != IMAGE_TOKEN]
        for row, (word, learned) in enumerate(words[1:]):
            if learned:
                total, count = total - log_p[row, word], count + 1
    (total / count).backward()

    assert count == seen["targets"] and mean_loss(seen) == pytest.approx((total / count).item(), rel=1e-6)
    expected = gradients(slow)
    assert found.keys() == expected.keys() == {name for name, p in slow.named_parameters() if p.requires_grad}
    for name in found:
        assert found[name].abs().max() > 0, name
        torch.testing.assert_close(found[name], expected[name], rtol=1e-7, atol=1e-10, msg=lambda m: f"{name}: {m}")


def test_frozen_parts_have_no_gradient_and_change_by_no_bit(tmp_path):
    for stage, learns in (("pretrain", ("projector.",)), ("finetune", ("projector.", "decoder."))):
        model, began = tiny_model(stage=stage), tiny_model(stage=stage).state_dict()
        tiny_run(tmp_path / stage, stage=stage, steps=3, model=model)
        for name, x in tensors(tmp_path / stage / "model").items():
            assert torch.equal(x, began[name]) == (not name.startswith(learns)), name
        assert not any(p.grad is not None for p in model.parameters() if not p.requires_grad)


def test_stage_1_keeps_of_a_frozen_layer_only_what_the_projectors_gradient_needs():
    """Per visual row and layer: the two norms' input and inner results, k and v, and gate, up and SiLU(gate) of the FFN;
    not what enters a frozen matrix. Nothing of the encoder's layers is kept at all."""
    config = tiny_config()
    C, F = config.llama.hidden_size, config.llama.intermediate_size
    picture = lambda side: encode_picture(side)

    def kept(stage: str, side: int) -> int:
        model, storages = tiny_model(stage=stage), {}
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def pack(x):
            if x.untyped_storage().data_ptr() not in weights:
                storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = model(picture(side))
        del loss
        return sum(storages.values()) // 4

    rows = 4 * 4 - 2 * 2
    each = {stage: (kept(stage, 4) - kept(stage, 2)) / rows / config.llama.num_hidden_layers
            for stage in ("pretrain", "finetune")}
    assert each["finetune"] - each["pretrain"] > C + F               # h or n, and SiLU(gate) * up
    assert each["pretrain"] < 3 * F + 8 * C

    model, seen = tiny_model(stage="pretrain"), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: seen.append(x) or x, lambda x: x):
        features = model.vision(picture(4).patches, [(4, 4)])
    assert not seen and not features.requires_grad


def encode_picture(side: int):
    vision = tiny_config().vision
    patches = torch.rand(side * side, vision.patch_dim, generator=torch.Generator().manual_seed(side))
    return collate([Sample([1, IMAGE_TOKEN, 5, 6, 7], [False, False, False, True, True], [(patches, (side, side))], "p")])


# ---- nothing lost ----

STEPS = 48


def logged_run(group, folder):
    def logged(*arguments):
        """Writes down every sample that is handed out."""
        last = None
        for p in load_batches(*arguments):
            with open(folder / "log", "a") as file:
                file.write(json.dumps([p.step, p.step != last, p.keys]) + "\n")
            last = p.step
            yield p
    tiny_run(folder, steps=STEPS, loader=logged, plan=tiny_plan(STEPS * 4, budget=4), resume=True, checkpoint_every=1)


def samples_of(folder) -> list[list[str]]:
    """Of each step, the last time that it was taken."""
    steps = {}
    for step, begins, keys in map(json.loads, (folder / "log").read_text().splitlines()):
        steps[step] = keys if begins else steps[step] + keys
    return [steps[step] for step in sorted(steps)]


def test_ten_kills_change_no_bit_and_lose_no_sample(tmp_path):
    for name in ("straight", "killed"):
        (tmp_path / name).mkdir()
    in_processes(1, logged_run, tmp_path / "straight")
    rng, saving = random.Random(0), 0
    folder = tmp_path / "killed"
    for kill in range(10):
        before = len(metrics(folder)) if kill else 0
        child, goal = start(logged_run, folder), before + rng.randint(1, 5)
        log = folder / "run" / "metrics.jsonl"
        while not (log.exists() and log.read_text().count("\n") >= goal):
            assert child.is_alive()
            time.sleep(0.002)
        deadline = time.time() + 5
        while kill % 2 and not list(folder.glob("run/checkpoints/.writing-*")) and time.time() < deadline:
            time.sleep(0.001)                                            # every other time: while it saves
        time.sleep(rng.random() * (0.01 if kill % 2 else 0.1))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        saving += bool(list(folder.glob("run/checkpoints/.writing-*")))
    assert len(metrics(folder)) < STEPS and saving
    in_processes(1, logged_run, folder)

    one, other = tensors(tmp_path / "straight" / "model"), tensors(folder / "model")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert [line["loss"] for line in metrics(folder)] == [line["loss"] for line in metrics(tmp_path / "straight")]
    assert samples_of(folder) == samples_of(tmp_path / "straight")
    seen = sorted(key for step in samples_of(folder) for key in step)
    assert seen == sorted(f"talk-{i}" for i in range(STEPS * 4) for _ in range(2))       # two epochs


def test_resuming_is_bit_identical_and_keeps_two_checkpoints(tmp_path):
    tiny_run(tmp_path / "straight", steps=20)

    def interrupted(*arguments):
        for p in load_batches(*arguments):
            if p.step == 10:
                os.kill(os.getpid(), signal.SIGINT)
            yield p
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Stopped, match="after step 11 of 20.*--resume"):
        tiny_run(tmp_path / "stopped", steps=20, loader=interrupted)
    assert signal.getsignal(signal.SIGINT) is before
    run = tiny_run(tmp_path / "stopped", steps=20, resume=True)
    assert run.saved_steps() == [18, 20]
    one, other = tensors(tmp_path / "straight" / "model"), tensors(tmp_path / "stopped" / "model")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert [line["step"] for line in metrics(tmp_path / "stopped")] == list(range(1, 21))


def test_a_checkpoint_cut_short_is_recognised_and_the_one_before_it_used(tmp_path, capsys):
    tiny_run(tmp_path / "straight")
    run = tiny_run(tmp_path / "cut")
    newest = run.checkpoints / "step-00000008"
    file = max(newest.iterdir(), key=lambda f: f.stat().st_size)
    os.truncate(file, file.stat().st_size - 100)
    assert not run.is_whole(8) and run.is_whole(6)
    with open(run.metrics, "a") as file:
        file.write('{"step": 9, "lo')                                    # a line cut short
    tiny_run(tmp_path / "cut", resume=True)
    assert "the checkpoint of step 8 is not whole: going back to the one before it" in capsys.readouterr().out
    one, other = tensors(tmp_path / "straight" / "model"), tensors(tmp_path / "cut" / "model")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert [line["step"] for line in metrics(tmp_path / "cut")] == list(range(1, 9))


def test_a_checkpoint_of_changed_bytes_is_recognised_and_the_one_before_it_used(tmp_path, capsys):
    run = tiny_run(tmp_path)
    newest = run.checkpoints / "step-00000008"
    file = max(newest.iterdir(), key=lambda f: f.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert not run.is_whole(8)
    before = tensors(tmp_path / "model")
    tiny_run(tmp_path, resume=True)
    assert "step 8 is not whole" in capsys.readouterr().out and run.is_whole(8)
    assert all(torch.equal(x, before[name]) for name, x in tensors(tmp_path / "model").items())


def test_runs_of_the_first_edition_are_refused_with_a_line_that_says_what_to_do(tmp_path):
    """Their run.json has no format."""
    run = tiny_run(tmp_path, steps=8)
    settings = json.loads((run.folder / "run.json").read_text())
    del settings["format"]
    (run.folder / "run.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"cannot be resumed: format was None and is now 2: go on with .*the release that began it, or .*--force"):
        tiny_run(tmp_path, steps=8, resume=True)
    assert run.saved_steps() == [6, 8]


def test_settings_of_a_visual_path_survive_their_file(tmp_path):
    settings = {"visual_path": make("eemllm-f", composite_layers=(1, 2)).to_dict()}
    RunFolder(tmp_path / "run", settings, ALONE, resume=False).lock.close()
    RunFolder(tmp_path / "run", settings, ALONE, resume=True).lock.close()
    settings = {"visual_path": make("eemllm-f", composite_layers=(1, 3)).to_dict()}
    with pytest.raises(UserError, match=r"visual_path was .*\[1, 2\].* and is now .*\[1, 3\]"):
        RunFolder(tmp_path / "run", settings, ALONE, resume=True)


def test_two_trainings_in_one_folder_are_refused(tmp_path):
    run = RunFolder(tmp_path / "run", {}, ALONE, resume=False)
    for resume, force in ((True, False), (False, True)):
        child = os.fork()
        if child == 0:
            try:
                RunFolder(tmp_path / "run", {}, ALONE, resume, force)
            except UserError as error:
                os._exit(0 if "another process trains in" in str(error) else 3)
            os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
    run.lock.close()                                                 # as the end of its process does
    RunFolder(tmp_path / "run", {}, ALONE, resume=True)


def test_force_killed_at_any_moment_leaves_the_old_run_or_the_new_one(tmp_path):
    """Whole: settings, metrics and checkpoints, each of the other kind resumed or refused by its settings."""
    tiny_run(tmp_path / "old", steps=2)
    settings = json.loads((tmp_path / "old" / "run" / "run.json").read_text())
    for number in itertools.count(1):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "old" / "run", folder)
        killed = killed_at(number, lambda: RunFolder(folder, settings | {"seed": 1}, ALONE, False, force=True).finish())
        new = json.loads((folder / "run.json").read_text())["seed"] == 1
        run = RunFolder(folder, settings | {"seed": int(new)}, ALONE, resume=True)
        assert run.saved_steps() == ([] if new else [2]) and run.metrics.exists() != new
        assert [p.name for p in tmp_path.iterdir() if p.name.startswith(f".{number}.")] == []
        if not killed:
            assert new and run.is_finished and number > 5
            return


def whole_run(folder):
    tiny_run(folder, steps=4, resume=True)


def test_a_run_killed_at_every_call_that_changes_the_disk(tmp_path):
    whole_run(tmp_path / "straight")
    expected = tensors(tmp_path / "straight" / "model")
    every = 1 if os.environ.get("KILL_MATRIX") else 8            # all of them take a minute and more
    for number in itertools.count(1, every):
        killed = killed_at(number, whole_run, tmp_path / str(number))
        whole_run(tmp_path / str(number))
        assert all(torch.equal(x, expected[name]) for name, x in tensors(tmp_path / str(number) / "model").items())
        assert len(metrics(tmp_path / str(number))) == 4
        if not killed:
            print(f"killed at every {every}. of {number - 1} calls")
            return


def fill_the_disk(group, folder):
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))          # no file may grow beyond 20 kB
    with pytest.raises(UserError, match=r"step-00000004 cannot be written \(.*the checkpoint before it stands.*--resume"):
        tiny_run(folder, steps=4, resume=True, checkpoint_every=4)


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path):
    class Enough(Exception):
        pass

    def ended(*arguments):
        for p in load_batches(*arguments):
            if p.step == 3:
                raise Enough
            yield p
    with pytest.raises(Enough):
        tiny_run(tmp_path, steps=4, loader=ended)
    in_processes(1, fill_the_disk, tmp_path)
    names = [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()]
    assert names == ["step-00000002"]
    assert tiny_run(tmp_path, steps=4, resume=True).saved_steps() == [2, 4]


def test_other_settings_are_named_and_nothing_is_overwritten(tmp_path):
    tiny_run(tmp_path, steps=2)
    settings = json.loads((tmp_path / "run" / "run.json").read_text())
    with pytest.raises(UserError, match="learning_rate was 0.01 and is now 0.5"):
        RunFolder(tmp_path / "run", settings | {"learning_rate": 0.5}, ALONE, resume=True, force=True)
    with pytest.raises(UserError, match="holds a run already.*--resume.*--force"):
        RunFolder(tmp_path / "run", settings, ALONE, resume=False)
    assert len(metrics(tmp_path)) == 2
    RunFolder(tmp_path / "run", settings, ALONE, resume=False, force=True)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


# ---- what a run sees ----

def test_metrics_held_out_loss_and_curve(tmp_path):
    run = tiny_run(tmp_path, steps=6, held_out=tiny_plan(16), plan=tiny_plan(budget=3))
    lines = metrics(tmp_path)
    assert {"step", "loss", "lr", "grad_norm", "tokens_per_s", "seconds", "waited_for_data", "memory_gb"} <= lines[0].keys()
    assert [line["step"] for line in lines if "held_out_loss" in line] == [2, 4, 6]
    assert lines[-1]["loss"] < lines[0]["loss"] and (run.folder / "loss.png").stat().st_size > 1000
    model = weights.load(tmp_path / "model", device="cpu")
    batch = collate([encode(Talks(16)[i]) for i in range(16)])
    with torch.no_grad():
        assert lines[-1]["held_out_loss"] == pytest.approx(model(batch).item() / len(batch.targets), rel=1e-5)


def test_schedule():
    config = TrainConfig("finetune", 400, 8, 2.0, warmup=0.04)
    rates = [learning_rate(config, step) for step in range(400)]
    assert rates[:3] == [0.125, 0.25, 0.375] and rates[15:17] == [2.0, 2.0]
    assert rates[208] == pytest.approx(1.0) and 0 < rates[399] < 0.01


@pytest.mark.parametrize("steps, warm", [(1, 1), (10, 2), (40, 8), (60, 8), (250, 8), (300, 9), (2180, 65)])
def test_short_runs_warm_up_too(steps, warm):
    config = TrainConfig("pretrain", steps, 8, 1.0)
    assert [learning_rate(config, step) for step in range(warm)] == [(step + 1) / warm for step in range(warm)]
    assert warm == steps or learning_rate(config, warm + 1) < 1


# ---- what goes wrong ----

def test_bad_samples_are_skipped_and_written_down(tmp_path):
    plan = tiny_plan(64, broken=(3, 17))
    run = tiny_run(tmp_path, plan=plan, max_bad=0.05)
    listed = [json.loads(line) for line in run.bad_samples.read_text().splitlines()]
    assert {entry["id"] for entry in listed} == {"talk-3", "talk-17"} and all(entry["reason"] for entry in listed)
    assert len(metrics(tmp_path)) == 8


def test_too_many_bad_samples_stop_the_run(tmp_path):
    with pytest.raises(UserError, match=r"\d of 8 samples so far could not be used, over 5.00% .*bad_samples.jsonl.*--max-bad"):
        tiny_run(tmp_path, plan=tiny_plan(64, broken=tuple(range(64))), max_bad=0.05)


def test_a_micro_batch_of_broken_samples_counts_for_nothing():
    plan = tiny_plan(8, budget=1, broken=(0, 1, 2))
    packed = list(load_batches(plan, encode, 0, 1))
    assert sum(not p.keys for p in packed) == 3
    model, other = tiny_model(), tiny_model()
    seen, *_ = accumulate(model, packed, backward=True)
    expected, *_ = accumulate(other, [p for p in packed if p.keys], backward=True)
    assert seen["bad"] == 3 and all(seen[name] == expected[name] for name in ("loss", "targets"))
    found, whole = gradients(model), gradients(other)
    assert all(torch.equal(found[name], whole[name]) for name in whole)


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_a_step_without_anything_to_learn_is_a_step_of_zero(stage):
    nothing = Packed(0, True, collate([Sample([0], [False], [], "")]), [], [("x", "broken")], 0)
    model = tiny_model(stage=stage)
    seen, *_ = accumulate(model, [nothing], backward=True)
    assert mean_loss(seen) == 0 and all((grad == 0).all() for grad in gradients(model).values())
    assert gradients(model).keys() == {name for name, p in model.named_parameters() if p.requires_grad}


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(tmp_path):
    def poisoned(*arguments):
        for p in load_batches(*arguments):
            if p.step == 5 and len(p.batch.patches):
                p.batch.patches[0, 0] = float("nan")
            yield p
    with pytest.raises(UserError, match=r"the loss is nan .* at step 6, samples talk-\d+.*the last checkpoint stands"):
        tiny_run(tmp_path, loader=poisoned, plan=tiny_plan(budget=2))
    assert len(metrics(tmp_path)) == 5
    assert tiny_run(tmp_path, resume=True, plan=tiny_plan(budget=2)).saved_steps() == [6, 8]


def test_out_of_memory_says_what_was_computed_and_what_to_lower(tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")
    model = tiny_model()
    monkeypatch.setattr(model.decoder, "logits", full)
    with pytest.raises(UserError, match=r"out of memory at step 1, in a micro-batch of 8 samples with [\d,]+ text and "
                       r"[\d,]+ visual tokens: lower --micro-batch-tokens .*--checkpoint-activations"):
        tiny_run(tmp_path, model=model)
    broken = nn.Linear(1, 1)
    monkeypatch.setattr(model.decoder, "logits", lambda *_: broken(torch.zeros(2, 3)))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):       # any other error stays what it is
        accumulate(model, load_batches(tiny_plan(), encode, 0, 1), backward=True)


def test_seen_sums_over_processes():
    seen = {"loss": 6.0, "targets": 3.0}
    assert ALONE.sum(seen) == seen and mean_loss(seen) == 2.0 and mean_loss({"loss": 0.0, "targets": 0}) == 0.0
