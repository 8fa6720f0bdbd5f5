"""Published folders in and out, against what transformers computed (make_golden.py), and broken ones."""

import dataclasses
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import nanoeemllm
from nanoeemllm.border import files
from nanoeemllm.border.command import run_command
from nanoeemllm.config import PRESETS, UserError
from nanoeemllm.data.images import prepare_image
from nanoeemllm.paths import make
from nanoeemllm.prompt import encode_prompt
from nanoeemllm.weights import chat, folder as model_folder, published, tensors
from nanoeemllm.weights.export import export
from tests.make_golden import (EXPORTS, GOLDEN, PROBE, SIZES, STRIDE, export_source, exported_files,
                               picture)

SOURCES = GOLDEN / "sources"
EXPECTED = load_file(GOLDEN / "expected.safetensors")
TOLERANCE = 1e-4


SCRIPT = Path(nanoeemllm.__file__).parent.parent / "convert_weights.py"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def convert(*args) -> None:
    """What the script does, by its flags, without starting a process."""
    given = [str(arg) for arg in args if arg != "--force"]
    flags = dict(zip(given[::2], given[1::2], strict=True))
    out = flags.pop("--out")
    model_folder.check_replaceable(out, "--force" in args)
    sources = {kind[2:].replace("-", "_"): value if kind == "--chat-template" else Path(value)
               for kind, value in flags.items() if kind != "--dtype"}
    model_folder.save(*published.read(**sources, dtype=DTYPES.get(flags.get("--dtype"))), out)


def converted(tmp_path, *args, **load):
    convert(*args, "--out", tmp_path / "model", "--dtype", "fp32")
    return nanoeemllm.load(tmp_path / "model", device="cpu", **load)


def test_a_conversion_killed_at_any_moment_leaves_the_old_model_or_the_new_one(tmp_path):
    """--force, killed at every call that changes the disk."""
    from test_border import killed_at
    tensors, config, tokenizer = published.read(SOURCES / "smollm2")
    changed = dataclasses.replace(config, chat_template="short")
    for number in range(1, 1000):
        folder = tmp_path / str(number) / "model"
        model_folder.save(tensors, config, tokenizer, folder)
        killed = killed_at(number, lambda: model_folder.save(tensors, changed, tokenizer, folder))
        assert folder.is_dir()                                           # before any other command
        files.finish_replacement(folder)
        found = model_folder.load(folder, "cpu").config.chat_template
        assert found in ((config.chat_template, "short") if killed else ("short",))
        assert [path.name for path in folder.parent.iterdir()] == ["model"]
        if not killed:
            assert number > 6
            return


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()


def merged(folder: Path, changes: dict = {}, dtype: torch.dtype | None = None) -> Path:
    """A source's shards made one file, with tensors changed, added, or (None) taken out."""
    tensors = {name: x.to(dtype) for file in folder.glob("*.safetensors") for name, x in load_file(file).items()}
    for file in folder.glob("model*"):
        file.unlink()
    save_file({name: x for name, x in (tensors | changes).items() if x is not None}, folder / "model.safetensors")
    return folder


# ---- equal to the reference ----


@pytest.mark.parametrize("name", ["vicuna", "llama3", "smollm2"])
def test_llama_logits_and_greedy_ids(name, tmp_path):
    model = converted(tmp_path, "--llm", SOURCES / name)
    ids = EXPECTED[f"{name}.ids"].tolist()
    assert difference(model.logits(ids), EXPECTED[f"{name}.logits"]) <= TOLERANCE
    assert list(model.generate(ids, max_new_tokens=64, stop_ids=set())) == EXPECTED[f"{name}.greedy"].tolist()


@pytest.mark.parametrize("name", ["siglip", "siglip_vision", "clip", "clip_vision", "idefics2"])
def test_vision_features(name, tmp_path):
    model = converted(tmp_path, "--llm", SOURCES / "smollm2", "--vision", SOURCES / name)
    for size, (width, height) in SIZES.items():
        patches, grid = prepare_image(picture(width, height), model.config.vision)
        with torch.no_grad():
            features = model.vision(patches, [grid])[::STRIDE]
        assert difference(features, EXPECTED[f"{name}.{size}"]) <= TOLERANCE, size
    C = model.config.vision.hidden_size
    assert model.projector.linear_1.weight.std().item() == pytest.approx(C ** -0.5, rel=0.2)


def test_new_visual_tokens_have_the_mean_and_the_spread_of_words(tmp_path):
    """Made by the conversion, and by load where the folder has no projector."""
    source = shutil.copytree(SOURCES / "smollm2", tmp_path / "source")
    words = published.read(source)[0]["decoder.embed_tokens.weight"].load().float()
    torch.manual_seed(0)
    mean, spread = 0.2 * torch.randn(words.shape[1]), 0.05 + 0.1 * torch.rand(words.shape[1])
    words = mean + spread * torch.randn_like(words)
    merged(source, {"model.embed_tokens.weight": words})
    model = converted(tmp_path, "--llm", source, "--vision", SOURCES / "siglip")
    state = {name: x for name, x in model.state_dict().items() if not name.startswith("projector.")}
    model_folder.save(state, model.config, model.tokenizer, tmp_path / "without")
    loaded = nanoeemllm.load(tmp_path / "without", "cpu", new_parts=True)
    for projector in (model.projector, loaded.projector):
        with torch.no_grad():
            visual = projector(torch.randn(4000, model.config.vision.hidden_size))
        rms = [x.square().mean().sqrt().item() for x in (visual, words)]
        assert rms[0] == pytest.approx(rms[1], rel=0.25)
        assert torch.corrcoef(torch.stack([visual.mean(0), mean]))[0, 1] > 0.8
        assert 0.5 < (visual.std(0) / spread).median() < 1.5


def renamed(folder: Path, out: Path, old: str, new: str, tower: str) -> Path:
    """A LLaVA folder in the layout of another release."""
    shutil.copytree(folder, out)
    tensors = {}
    for name, x in load_file(folder / "model.safetensors").items():
        name = name.replace("language_model.lm_head.", "lm_head.") if new != old else name
        name = name.replace(old, new).replace("vision_tower.", tower)
        tensors["model." + name if new != old and name.startswith("multi_modal") else name] = x
    tensors[tower + "embeddings.position_ids"] = torch.arange(17)[None]
    tensors[new + "layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, out / "model.safetensors")
    return out


@pytest.mark.parametrize("layout", ["as saved", "older", "newer"])
@pytest.mark.parametrize("images", ["one", "three"])
def test_llava_under_both_visual_paths(layout, images, tmp_path):
    folder, old = SOURCES / "llava", "language_model.model."
    if layout == "older":
        folder = renamed(folder, tmp_path / "source", old, old, "vision_tower.vision_model.")
    elif layout == "newer":
        folder = renamed(folder, tmp_path / "source", old, "model.language_model.", "model.vision_tower.vision_model.")
    convert("--llava", folder, "--out", tmp_path / "model")
    ids = EXPECTED[f"llava.{images}.ids"].tolist()
    pictures = [picture(60 + 50 * i, 90) for i in range(ids.count(-200))]
    for path in ("llava", "eemllm"):
        model = nanoeemllm.load(tmp_path / "model", device="cpu", dtype=torch.float32, visual_path=path)
        assert difference(model.logits(ids, pictures), EXPECTED[f"llava.{images}.{path}.logits"]) <= TOLERANCE
        greedy = EXPECTED[f"llava.{images}.{path}.greedy"].tolist()
        assert list(model.generate(ids, pictures, max_new_tokens=64, stop_ids=set())) == greedy
    assert model.tokenizer.eos_id == 2 and model.config.chat_template == "vicuna_v1"
    assert nanoeemllm.load(tmp_path / "model", device="cpu").config.visual_path.name == "llava"


# ---- as published ----


PUBLISHED = {  # config.json of lmsys/vicuna-7b-v1.5, text_config of llava-hf/llava-1.5-7b-hf, SmolLM2-135M-Instruct
    "vicuna": {"architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "hidden_act": "silu", "hidden_size": 4096,
               "intermediate_size": 11008, "max_position_embeddings": 4096, "model_type": "llama",
               "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32, "pretraining_tp": 1,
               "rms_norm_eps": 1e-05, "rope_scaling": None, "tie_word_embeddings": False, "vocab_size": 32000},
    "llava": {"_name_or_path": "lmsys/vicuna-7b-v1.5", "max_position_embeddings": 4096, "model_type": "llama",
              "rms_norm_eps": 1e-05, "torch_dtype": "float16", "vocab_size": 32064},
    "smollm2": {"attention_bias": False, "hidden_act": "silu", "hidden_size": 576, "intermediate_size": 1536,
                "is_llama_config": True, "max_position_embeddings": 8192, "model_type": "llama",
                "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3, "rms_norm_eps": 1e-05,
                "rope_interleaved": False, "rope_scaling": None, "rope_theta": 100000,
                "tie_word_embeddings": True, "vocab_size": 49152},
}


def test_published_llama_configurations():
    assert published.llama_config(Path("v"), PUBLISHED["vicuna"]) == PRESETS["eemllm-7b"].llama
    assert published.llama_config(Path("l"), PUBLISHED["llava"]) == PRESETS["llava-1.5-7b"].llama
    small = published.llama_config(Path("s"), PUBLISHED["smollm2"])
    assert (small.head_dim, small.num_key_value_heads, small.rope_theta) == (64, 3, 1e5)
    assert small.tie_word_embeddings


@pytest.mark.parametrize("architecture, config, preset", [
    ("SiglipModel", {"vision_config": {"hidden_size": 1152, "image_size": 384, "intermediate_size": 4304,
                                       "num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14}},
     "eemllm-7b"),
    ("Idefics2ForConditionalGeneration",
     {"vision_config": {"hidden_size": 1152, "image_size": 980, "intermediate_size": 4304, "model_type": "idefics2",
                        "num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14}}, "eemllm-7b-980"),
    ("LlavaForConditionalGeneration",
     {"vision_config": {"hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "num_hidden_layers": 24,
                        "model_type": "clip_vision_model", "num_attention_heads": 16, "patch_size": 14,
                        "projection_dim": 768, "vocab_size": 32000}, "vision_feature_layer": -2}, "llava-1.5-7b"),
    ("LlavaForConditionalGeneration", {}, "llava-1.5-7b"),
])
def test_published_vision_configurations(architecture, config, preset, tmp_path):
    source = object.__new__(published.Source)
    source.folder, source.where, source.config = tmp_path, "c", config
    source.kind = (published.VISION | published.LLAVA)[architecture]
    assert published.vision_config(source)[0] == PRESETS[preset].vision


def test_context_that_holds_the_largest_picture(capsys):
    llama = PRESETS["eemllm-7b"].llama
    assert published.with_room_for(PRESETS["eemllm-7b"].vision, llama) == llama
    assert published.with_room_for(PRESETS["eemllm-7b-980"].vision, llama) == PRESETS["eemllm-7b-980"].llama
    assert "4900 tokens" in capsys.readouterr().err


def test_stored_dtype_by_default_and_dtype_asked_for(tmp_path):
    convert("--llm", SOURCES / "vicuna", "--out", tmp_path / "model")
    assert nanoeemllm.load(tmp_path / "model", device="cpu").dtype == torch.float16
    convert("--llm", SOURCES / "vicuna", "--out", tmp_path / "model", "--dtype", "bf16", "--force")
    assert nanoeemllm.load(tmp_path / "model", device="cpu").dtype == torch.bfloat16


def test_a_stored_head_that_is_tied_is_passed_over(tmp_path):
    folder = merged(shutil.copytree(SOURCES / "smollm2", tmp_path / "source"), {"lm_head.weight": torch.zeros(330, 32)})
    model = converted(tmp_path, "--llm", folder)
    assert difference(model.logits(EXPECTED["smollm2.ids"].tolist()), EXPECTED["smollm2.logits"]) <= TOLERANCE


def test_weights_of_another_type_need_dtype(tmp_path):
    folder = merged(shutil.copytree(SOURCES / "smollm2", tmp_path / "source"), dtype=torch.float64)
    with pytest.raises(UserError, match="give --dtype"):
        convert("--llm", folder, "--out", tmp_path / "model")
    model = converted(tmp_path, "--llm", folder)
    assert difference(model.logits(EXPECTED["smollm2.ids"].tolist()), EXPECTED["smollm2.logits"]) <= TOLERANCE


def test_added_tokens_beside_tokenizer_model(tmp_path):
    folder = shutil.copytree(SOURCES / "vicuna", tmp_path / "source")
    (folder / "added_tokens.json").write_text('{"<pad>": 401, "<image>": 400}')
    tokenizer = published.read_tokenizer(folder)
    assert (tokenizer.special_id("<image>"), tokenizer.special_id("<pad>"), tokenizer.vocab_size) == (400, 401, 402)
    (folder / "added_tokens.json").write_text('{"<pad>": 405}')
    with pytest.raises(UserError, match="<pad>"):
        published.read_tokenizer(folder)


def test_shards_of_limited_size_load_again(tmp_path, monkeypatch):
    monkeypatch.setattr(tensors, "SHARD_BYTES", 20_000)
    model = converted(tmp_path, "--llm", SOURCES / "vicuna")
    files = sorted((tmp_path / "model").glob("model-*.safetensors"))
    assert len(files) > 3 and all(f"of-{len(files):05d}" in file.name for file in files)
    assert difference(model.logits(EXPECTED["vicuna.ids"].tolist()), EXPECTED["vicuna.logits"]) <= TOLERANCE


# ---- bad input ----


@pytest.fixture
def llm(tmp_path):
    """A sharded source that a test may break."""
    return shutil.copytree(SOURCES / "smollm2", tmp_path / "source")


def refused(capsys, out: Path, *args) -> str:
    """The one line of a conversion that ends with exit code 2 and leaves nothing behind."""
    before = sorted(out.parent.rglob("*"))
    with pytest.raises(SystemExit) as exit:
        run_command(lambda: convert(*args, "--out", out))
    assert exit.value.code == 2 and sorted(out.parent.rglob("*")) == before
    message = capsys.readouterr().err.strip().splitlines()
    assert len(message) == 1 and message[0].startswith("error: "), message
    return message[0]


def edit(path: Path, change) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


INDEX = "model.safetensors.index.json"
SHARD = "model-00002-of-00003.safetensors"


@pytest.mark.parametrize("missing", ["config.json", SHARD, "tokenizer.json", "source"])
def test_missing_file(missing, llm, tmp_path, capsys):
    target = llm if missing == "source" else llm / missing
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    assert missing in refused(capsys, tmp_path / "model", "--llm", llm)


def test_no_weights(llm, tmp_path, capsys):
    for file in llm.glob("model*"):
        file.unlink()
    assert "pytorch_model.bin" in refused(capsys, tmp_path / "model", "--llm", llm)


def test_index_without_an_entry(llm, tmp_path, capsys):
    edit(llm / INDEX, lambda index: index["weight_map"].pop("model.layers.1.mlp.up_proj.weight"))
    message = refused(capsys, tmp_path / "model", "--llm", llm)
    assert f"{INDEX} and its files do not hold the same tensors: model.layers.1.mlp.up_proj.weight" in message


def test_index_entry_without_a_tensor(llm, tmp_path, capsys):
    edit(llm / INDEX, lambda index: index["weight_map"].update({"model.norm.bias": SHARD}))
    assert "model.norm.bias" in refused(capsys, tmp_path / "model", "--llm", llm)


@pytest.mark.parametrize("file, said", [*((file, "not the name of a file") for file in (
    "../source/" + SHARD, "/etc/passwd", "..", "")), (3, "3: no such file"), ({}, "not the name of a file")])
def test_index_that_leaves_the_folder(file, said, llm, tmp_path, capsys):
    edit(llm / INDEX, lambda index: index["weight_map"].update({"model.norm.weight": file}))
    assert said in refused(capsys, tmp_path / "model", "--llm", llm)


@pytest.mark.parametrize("keep", [0, 5, 300, 20000])
def test_truncated_safetensors(keep, llm, tmp_path, capsys):
    (llm / SHARD).write_bytes((llm / SHARD).read_bytes()[:keep])
    assert SHARD in refused(capsys, tmp_path / "model", "--llm", llm)


def test_tensors_that_do_not_fit(llm, tmp_path, capsys):
    merged(llm, {f"model.layers.0.self_attn.q_proj.bias{i}": torch.zeros(1) for i in range(12)}
           | {"model.norm.weight": torch.zeros(5), "model.layers.0.mlp.gate_proj.weight": None})
    message = refused(capsys, tmp_path / "model", "--llm", llm)
    assert "1 missing: decoder.layers.0.mlp.gate_proj.weight" in message
    assert "12 unexpected: model.layers.0.self_attn.q_proj.bias0, " in message and message.count(".bias") == 10
    assert "decoder.norm.weight is (5,), not (32,)" in message
    merged(llm, {"model.norm.weight": None})
    assert "2 missing: decoder.layers.0.mlp.gate_proj.weight, decoder.norm.weight" in refused(capsys, tmp_path / "model", "--llm", llm)


@pytest.mark.parametrize("change, said", [
    ({"architectures": ["Qwen2ForCausalLM"]}, "Qwen2ForCausalLM is not supported here; supported: LlamaForCausalLM"),
    ({"architectures": None, "model_type": "qwen2"}, "supported: LlamaForCausalLM"),
    ({"architectures": None, "model_type": ["llama"]}, "supported: LlamaForCausalLM"),
    ({"rope_parameters": {"rope_type": "yarn"}}, "yarn"),
    ({"hidden_act": "gelu"}, "gelu"), ({"attention_bias": True}, "attention_bias"),
    ({"architectures": 3}, "supported: LlamaForCausalLM"), ({"rope_parameters": 3}, "rope_parameters"),
    ({"num_hidden_layers": 10 ** 12}, "num_hidden_layers"), ({"hidden_size": 1e308}, "hidden_size"),
    ({"vocab_size": 2 ** 31}, "vocab_size"), ({"rms_norm_eps": 0}, "rms_norm_eps"), ({"head_dim": -8}, "head_dim"),
    ({"rope_parameters": {"rope_theta": [1]}}, "rope_theta"), ({"rope_parameters": {"rope_type": [1]}}, "not supported"),
    ({"rope_parameters": {"rope_type": "llama3", "factor": {}, "low_freq_factor": 1, "high_freq_factor": 4,
                          "original_max_position_embeddings": 64}}, "factor"),
    ({"num_attention_heads": "4"}, "num_attention_heads"), ({"num_hidden_layers": 0}, "num_hidden_layers"),
    ({"rope_parameters": {"rope_type": "llama3"}}, "low_freq_factor"), ({"num_key_value_heads": 3}, "3"),
])
def test_unsupported_configuration(change, said, llm, tmp_path, capsys):
    edit(llm / "config.json", lambda config: config.update(change))
    assert said in refused(capsys, tmp_path / "model", "--llm", llm)


@pytest.mark.parametrize("change", [{"num_hidden_layers": 10 ** 12}, {"image_size": 2 ** 20}, {"patch_size": 0.5},
                                    {"num_attention_heads": 0}, {"layer_norm_eps": 1e300 * 1e8}])
def test_numbers_of_an_encoder_out_of_range(change, tmp_path, capsys):
    folder = shutil.copytree(SOURCES / "clip_vision", tmp_path / "vision")
    edit(folder / "config.json", lambda config: config.update(change))
    message = refused(capsys, tmp_path / "model", "--llm", SOURCES / "smollm2", "--vision", folder)
    assert next(iter(change)) in message or "finite" in message


def test_broken_json(llm, tmp_path, capsys):
    (llm / "config.json").write_text("{")
    assert "config.json" in refused(capsys, tmp_path / "model", "--llm", llm)
    (llm / "config.json").write_bytes(b"\xff\xfe[]")
    assert "config.json" in refused(capsys, tmp_path / "model", "--llm", llm)


class Malicious:
    def __reduce__(self):
        return eval, ("open('/tmp/nanoeemllm-pwned', 'w')",)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickle_with_code(zipped, llm, tmp_path, capsys):
    for file in llm.glob("model*"):
        file.unlink()
    torch.save({"model.norm.weight": Malicious()}, llm / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    assert "can run any code" in refused(capsys, tmp_path / "model", "--llm", llm)
    assert not Path("/tmp/nanoeemllm-pwned").exists()


@pytest.mark.parametrize("keep", [0, 1, 1000, 20000])
def test_truncated_bin(keep, tmp_path, capsys):
    folder = shutil.copytree(SOURCES / "vicuna", tmp_path / "source")
    file = folder / "pytorch_model-00001-of-00002.bin"
    file.write_bytes(file.read_bytes()[:keep])
    assert "damaged" in refused(capsys, tmp_path / "model", "--llm", folder)


def test_bins_of_the_oldest_format(tmp_path):
    folder = shutil.copytree(SOURCES / "vicuna", tmp_path / "source")
    for file in folder.glob("*.bin"):
        torch.save(torch.load(file), file, _use_new_zipfile_serialization=False)
    model = converted(tmp_path, "--llm", folder)
    assert difference(model.logits(EXPECTED["vicuna.ids"].tolist()), EXPECTED["vicuna.logits"]) <= TOLERANCE


def test_full_disk(llm, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(files.os, "fsync", full)
    assert "No space left on device" in refused(capsys, tmp_path / "model", "--llm", llm)


def test_output_that_holds_something(llm, tmp_path, capsys):
    convert("--llm", llm, "--out", tmp_path / "model")
    assert "--force" in refused(capsys, tmp_path / "model", "--llm", llm)
    convert("--llm", llm, "--out", tmp_path / "model", "--force")
    assert sorted(x.name for x in tmp_path.iterdir()) == ["model", "source"]
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    assert "no model folder" in refused(capsys, other, "--llm", llm, "--force")
    assert "no model folder" in refused(capsys, llm, "--llm", llm, "--force")


def test_failing_halfway_keeps_the_old_model(llm, tmp_path, capsys, monkeypatch):
    convert("--llm", llm, "--out", tmp_path / "model")
    before = (tmp_path / "model" / "config.json").read_text()
    monkeypatch.setattr(files, "flush", lambda folder: (_ for _ in ()).throw(OSError(28, "full")))
    refused(capsys, tmp_path / "model", "--llm", llm, "--dtype", "fp32", "--force")
    assert (tmp_path / "model" / "config.json").read_text() == before


def test_command_line(tmp_path, monkeypatch):
    """As a user runs it; and arguments that do not go together."""
    def run(*args):
        return subprocess.run([sys.executable, SCRIPT, *args], capture_output=True, text=True, cwd=tmp_path)
    done = run("--llm", SOURCES / "smollm2", "--out", "new/smollm2")
    assert done.returncode == 0 and "chatml" in done.stdout and (tmp_path / "new/smollm2/tokenizer.json").is_file()
    failed = run("--llm", SOURCES / "nothing", "--out", "other")
    assert failed.returncode == 2 and failed.stderr.startswith("error: ") and failed.stderr.count("\n") == 1
    script = runpy.run_path(str(SCRIPT))
    for args in (["--llava", "a", "--llm", "b"], ["--vision", "a"], ["--llava", "a", "--vision", "b"], [],
                 ["--to-hf", "a", "--llm", "b"], ["--to-hf", "a", "--vision", "b"], ["--to-hf", "a", "--force"]):
        monkeypatch.setattr(sys, "argv", ["convert_weights.py", *args, "--out", "other"])
        with pytest.raises(UserError, match="give either|required"):
            script["parse"]()
    assert run("--llm", SOURCES / "smollm2", "--out", "new/smollm2").stderr.count("--force") == 1
    done = run("--to-hf", "new/smollm2", "--out", "out")
    assert done.returncode == 0 and "LlamaForCausalLM" in done.stdout and (tmp_path / "out/config.json").is_file()
    failed = run("--to-hf", "new/smollm2", "--out", "out")
    assert failed.returncode == 2 and "out is there already" in failed.stderr


@pytest.mark.parametrize("path, new, left_out", [("saisa", 12, 4), ("flamingo", 12, 0)])
def test_another_path_with_weights_of_its_own_begins_at_random(path, new, left_out, tmp_path):
    convert("--llava", SOURCES / "llava", "--out", tmp_path / "model")
    path = make(path, **({"every": 3} if path == "flamingo" else {}))
    with pytest.raises(UserError, match=f"trained as llava; {path.name} as asked for has other weights"):
        nanoeemllm.load(tmp_path / "model", device="cpu", visual_path=path)
    old = nanoeemllm.load(tmp_path / "model", device="cpu").state_dict()
    model = nanoeemllm.load(tmp_path / "model", device="cpu", visual_path=path, new_parts=True).state_dict()
    assert len(model.keys() - old.keys()) == new and len(old.keys() - model.keys()) == left_out
    assert all(torch.equal(model[name], old[name]) for name in model.keys() & old.keys())
    assert all(x.isfinite().all() and x.dtype == torch.float16 for x in model.values())


@pytest.mark.parametrize("path", [
    "naavit", make("yopo", last_visual_layer=2, prune_heads=1),
    make("eemllm-f", composite_layers=(1, 2)), make("saisa"),
    make("flamingo", every=3)])
def test_every_visual_path_loads_and_answers(path, tmp_path):
    convert("--llava", SOURCES / "llava", "--out", tmp_path / "model")
    model = nanoeemllm.load(tmp_path / "model", "cpu", torch.float32, path, new_parts=True)
    ids = EXPECTED["llava.one.ids"].tolist()
    assert model.logits(ids, [picture(60, 90)]).isfinite().all()
    assert len(list(model.generate(ids, [picture(60, 90)], max_new_tokens=3, stop_ids=set()))) == 3


@pytest.mark.parametrize("damage, said", [
    (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json"),
    (lambda folder: (folder / "tokenizer.json").write_text("{}"), "tokenizer.json"),
    (lambda folder: (folder / "config.json").unlink(), "config.json"),
    (lambda folder: edit(folder / "config.json", lambda c: c["llama"].update(num_hidden_layers=3)), "9 missing"),
    (lambda folder: edit(folder / "config.json", lambda c: c.update(wings=2)), "wings"),
    (lambda folder: edit(folder / INDEX, lambda i: i["weight_map"].update(x="../x")), "../x"),
    (lambda folder: next(folder.glob("model-*.safetensors")).write_bytes(b"123"), "cut off"),
    (lambda folder: next(folder.glob("model-*.safetensors")).unlink(), "no such file"),
])
def test_loading_a_broken_model_folder(damage, said, tmp_path):
    convert("--llm", SOURCES / "smollm2", "--out", tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(UserError, match=said):
        nanoeemllm.load(tmp_path / "model", device="cpu")


@pytest.mark.parametrize("about", [{"5": "<tool>"}, {"x": {"content": "<tool>"}}, {"5": {}}, ["<tool>"]])
def test_odd_added_tokens_are_refused(tmp_path, about):
    folder = shutil.copytree(SOURCES / "vicuna", tmp_path / "source")
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": about}))
    with pytest.raises(UserError, match="added token's id and text"):
        published.read_tokenizer(folder)


def test_an_added_token_that_is_not_special_is_read_and_said(tmp_path):
    folder = shutil.copytree(SOURCES / "vicuna", tmp_path / "source")
    for file in ("tokenizer_config.json", "added_tokens.json"):
        (folder / file).unlink(missing_ok=True)
    new = published.read_tokenizer(folder).vocab_size
    added = {str(new): {"content": "<tool>", "special": False}, str(new + 1): {"content": "<end>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    tokenizer = published.read_tokenizer(folder)
    assert new in tokenizer.encode("a <tool> b") and "<tool>" in tokenizer.decode([new]) and tokenizer.decode([new + 1]) == ""


# ---- what a checkpoint says about itself ----


def test_model_type_names_the_architecture_where_nothing_else_does(llm, tmp_path):
    edit(llm / "config.json", lambda config: config.pop("architectures"))
    model = converted(tmp_path, "--llm", llm)
    assert difference(model.logits(EXPECTED["smollm2.ids"].tolist()), EXPECTED["smollm2.logits"]) <= TOLERANCE


@pytest.mark.parametrize("files, ids", [
    ({"generation_config": {"eos_token_id": [4, 1]}, "config": {"eos_token_id": 3}}, (4, 1)),
    ({"generation_config": {"eos_token_id": 7}}, (7,)),
    ({"generation_config": {"eos_token_id": None}, "config": {"eos_token_id": 3}}, (3,)),
    ({"generation_config": {}, "config": {"eos_token_id": None},
      "tokenizer_config": {"eos_token": "<|im_end|>"}}, (2,)),
    ({"generation_config": {}, "config": {"eos_token_id": 10 ** 5},           # no such token
      "tokenizer_config": {"eos_token": {"content": "<|im_start|>"}}}, (1,)),
    ({"generation_config": {}, "config": {"eos_token_id": None}}, (0,)),      # by name: <|endoftext|>
])
def test_end_tokens(files, ids, llm, tmp_path):
    for name, data in files.items():
        path = llm / f"{name}.json"
        old = json.loads(path.read_text()) if name == "config" else {}
        path.write_text(json.dumps(old | data))
    convert("--llm", llm, "--out", tmp_path / "model")
    model = nanoeemllm.load(tmp_path / "model", device="cpu")
    assert model.config.eos_token_ids == model.tokenizer.eos_ids == ids
    assert model.tokenizer.stop_ids("chatml") == {*ids, 2}


def test_an_end_token_of_an_unknown_name(llm, tmp_path):
    text = (llm / "tokenizer.json").read_text().replace("<|endoftext|>", "<|fin|>").replace("<|im_end|>", "<|stop|>")
    (llm / "tokenizer.json").write_text(text)
    convert("--llm", llm, "--out", tmp_path / "model", "--chat-template", "vicuna_v1")
    assert nanoeemllm.load(tmp_path / "model", device="cpu").tokenizer.eos_id == 2
    (llm / "generation_config.json").unlink()
    edit(llm / "config.json", lambda config: config.pop("eos_token_id"))
    with pytest.raises(UserError, match="none of the end tokens"):
        convert("--llm", llm, "--out", tmp_path / "other", "--chat-template", "vicuna_v1")


@pytest.mark.parametrize("about, bos", [({}, 0), ({"add_bos_token": True}, 3), ({"add_bos_token": False}, None)])
def test_bos(about, bos, tmp_path):
    folder = shutil.copytree(SOURCES / "llama3", tmp_path / "source")
    (folder / "generation_config.json").write_text('{"bos_token_id": 3}')
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    convert("--llm", folder, "--out", tmp_path / "model")
    assert nanoeemllm.load(tmp_path / "model", device="cpu").tokenizer.bos_id == bos


@pytest.mark.parametrize("file, change", [
    ("generation_config.json", {"eos_token_id": -1}), ("generation_config.json", {"eos_token_id": ["2"]}),
    ("generation_config.json", {"eos_token_id": True}), ("tokenizer_config.json", {"add_bos_token": 1}),
    ("config.json", {"rope_scaling": 3}), ("config.json", {"rope_parameters": None, "rope_scaling": {"type": []}}),
])
def test_odd_words_about_tokens_are_refused(file, change, llm, tmp_path, capsys):
    old = json.loads((llm / file).read_text()) if (llm / file).exists() else {}
    (llm / file).write_text(json.dumps(old | change))
    if "rope_scaling" in change and "rope_parameters" not in change:
        edit(llm / file, lambda config: config.pop("rope_parameters"))
    assert file in refused(capsys, tmp_path / "model", "--llm", llm)


KNOWN = json.loads((GOLDEN / "templates.json").read_text())


@pytest.mark.parametrize("where", KNOWN)
def test_a_known_chat_template_writes_what_ours_does(where):
    """What Jinja made of a probe conversation, against our prompt of it, special tokens and all."""
    known = KNOWN[where]
    source = {"chatml": "smollm2", "llama3": "llama3"}.get(known["ours"], "vicuna")
    tokenizer = published.read_tokenizer(SOURCES / source)
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    turns = [{"from": names[role], "value": text} for role, text in PROBE]
    written = tokenizer._tokenizer.decode(encode_prompt(tokenizer, turns, known["ours"]), skip_special_tokens=False)
    if where.startswith("llava"):                    # its template leaves the end token out
        written = written.replace("<s>", "").replace("</s>", "")
    theirs = known["writes"].replace("<s>", "<|begin_of_text|>") if source == "llama3" else known["writes"]
    assert "".join(theirs.split()) == "".join(written.split())
    assert chat.fingerprint(known["template"]) == known["fingerprint"]
    assert where.startswith("our ") or chat.KNOWN[known["fingerprint"]] == known["ours"]


@pytest.mark.parametrize("keep", ["jinja", "json", "config"])
def test_the_chat_template_is_the_folders_own(keep, llm, tmp_path, capsys):
    text = KNOWN["SmolLM2-Instruct"]["template"].replace("\\n", "\n")          # raw newlines, as some copies have
    name = {"jinja": "chat_template.jinja", "json": "chat_template.json"}.get(keep, "tokenizer_config.json")
    (llm / name).write_text(text if keep == "jinja" else json.dumps({"chat_template": text}))
    convert("--llm", llm, "--out", tmp_path / "model")
    assert model_folder.read_config(tmp_path / "model").chat_template == "chatml"
    (llm / name).write_text("{{ raise }}" if keep == "jinja" else json.dumps({"chat_template": "{{ raise }}"}))
    assert "--chat-template" in refused(capsys, tmp_path / "other", "--llm", llm)
    (llm / "tokenizer_config.json").write_text(json.dumps({"chat_template": [{"name": "default"}]}))
    assert "--chat-template" in refused(capsys, tmp_path / "other", "--llm", llm)
    convert("--llm", llm, "--out", tmp_path / "other", "--chat-template", "plain")


def test_a_template_that_does_not_fit_the_tokenizer(llm, tmp_path, capsys):
    assert "<|start_header_id|>" in refused(capsys, tmp_path / "model", "--llm", llm, "--chat-template", "llama3")
    (llm / "chat_template.jinja").write_text(KNOWN["Meta-Llama-3-Instruct"]["template"])
    assert "<|start_header_id|>" in refused(capsys, tmp_path / "model", "--llm", llm)


# ---- out again ----


@pytest.mark.parametrize("name", EXPORTS)
def test_out_and_in_again(name, tmp_path, capsys):
    """What transformers was given when it computed the golden logits, which ours equal under llava."""
    model, out = export_source(name, tmp_path)
    assert exported_files(out) == json.loads((GOLDEN / "exported.json").read_text())[name]
    has_vision = model_folder.read_config(model).vision is not None
    notes = capsys.readouterr().err
    assert ("LLaVA's attention" in notes) == (name in ("siglip", "clip"))
    ours = nanoeemllm.load(model, "cpu", torch.float32, visual_path="llava" if has_vision else None)
    ids = EXPECTED[f"export.{name}.ids"].tolist()
    images = [picture(60 + 50 * i, 90) for i in range(ids.count(-200))]
    assert difference(ours.logits(ids, images), EXPECTED[f"export.{name}.logits"]) <= TOLERANCE

    convert("--llava" if has_vision else "--llm", out, "--out", tmp_path / "again")
    before, after = (nanoeemllm.load(x, "cpu", visual_path="llava") for x in (model, tmp_path / "again"))
    new, old = after.state_dict(), before.state_dict()
    assert new.keys() == old.keys()
    for key, x in old.items():
        assert x.dtype == new[key].dtype and torch.equal(x, new[key][:len(x)]), key
    rows = {"siglip": 331, "clip": 401}.get(name, before.config.llama.vocab_size)        # <image> is new
    llama = dataclasses.replace(before.config.llama, vocab_size=rows)
    assert after.config == dataclasses.replace(before.config, llama=llama)
    text = "A cat, na\u00efve."
    assert after.tokenizer.encode(text, bos=True) == before.tokenizer.encode(text, bos=True)
    with pytest.raises(UserError, match="model folder of ours"):
        convert("--llm", model, "--out", tmp_path / "third")


def test_new_rows_are_never_the_likeliest(tmp_path):
    model, out = export_source("siglip", tmp_path)
    convert("--llava", out, "--out", tmp_path / "again")
    logits = nanoeemllm.load(tmp_path / "again", "cpu", torch.float32).logits([5, 6, 7])
    assert (logits[:, :330].max(1).values > logits[:, 330]).all()


@pytest.mark.parametrize("change, said", [
    ({"visual_path": {"name": "saisa"}}, "saisa"), ({"visual_path": {"name": "flamingo", "every": 3}}, "flamingo"),
    ({"vision": {"resize": "native"}}, "aspect ratio"), ({"vision": {"resize": "square"}}, "not square"),
])
def test_what_the_layout_cannot_say(change, said, tmp_path):
    convert("--llava", SOURCES / "llava", "--out", tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    for key, value in change.items():
        config[key] |= value
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=said):
        export(tmp_path / "model", tmp_path / "out")
    with pytest.raises(UserError, match="llava/config.json is a published model's"):
        export(SOURCES / "llava", tmp_path / "out")
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="there already"):
        export(tmp_path / "model", tmp_path / "out")


# ---- special files, empty tensors, hostile tokenizers ----


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "tokenizer.json", INDEX, SHARD,
                                  "tokenizer_config.json", "chat_template.jinja"])
@pytest.mark.parametrize("kind", ["fifo", "folder", "device"])
def test_special_files_of_a_source(file, kind, llm, tmp_path, capsys):
    (llm / file).unlink(missing_ok=True)
    make = {"fifo": os.mkfifo, "folder": os.mkdir, "device": lambda path: path.symlink_to("/dev/zero")}
    make[kind](llm / file)
    assert file in refused(capsys, tmp_path / "model", "--llm", llm)


@pytest.mark.parametrize("file", ["tokenizer.json", "config.json", "model-00001-of-00001.safetensors"])
def test_special_files_of_a_model_folder(file, tmp_path):
    convert("--llm", SOURCES / "smollm2", "--out", tmp_path / "model")
    (tmp_path / "model" / file).unlink()
    os.mkfifo(tmp_path / "model" / file)
    with pytest.raises(UserError, match="not a regular file"):
        nanoeemllm.load(tmp_path / "model", device="cpu")


@pytest.mark.parametrize("indexed", [True, False])
def test_an_extra_tensor_is_refused_even_when_it_is_empty(indexed, tmp_path):
    convert("--llm", SOURCES / "smollm2", "--out", tmp_path / "model")
    file = tmp_path / "model/model-00001-of-00001.safetensors"
    save_file(load_file(file) | {"decoder.extra": torch.zeros(0)}, file)
    if indexed:
        edit(tmp_path / "model" / INDEX, lambda index: index["weight_map"].update({"decoder.extra": file.name}))
    said = "1 unexpected: decoder.extra" if indexed else f"{INDEX} and its files do not hold the same tensors: decoder.extra"
    with pytest.raises(UserError, match=said):
        nanoeemllm.load(tmp_path / "model", device="cpu")


HOSTILE = {     # the library raises on three, and panics on four, on loading or on the first text
    "no such merge": lambda data: data["model"].update(merges=[["\u0000", "?"]]),
    "no unknown token": lambda data: data["model"].update(unk_token="<none>", vocab={"<|endoftext|>": 0}, merges=[]),
    "an unknown kind": lambda data: data.update(normalizer={"type": "Mystery"}),
    "a broken character map": lambda data: data.update(normalizer={
        "type": "Precompiled", "precompiled_charsmap": "BAAAAP////8="}),
    "a replacement of nothing": lambda data: data.update(normalizer={
        "type": "Replace", "pattern": {"String": ""}, "content": "x"}),
    "a strip without end": lambda data: data.update(decoder={
        "type": "Strip", "content": "a", "start": 10 ** 9, "stop": 10 ** 9}),
    "chunks of nothing": lambda data: data.update(pre_tokenizer={"type": "FixedLength", "length": 0}),
    "a giant id": lambda data: data["model"]["vocab"].update({"zz": 2 ** 32 - 1}),
}


@pytest.mark.parametrize("how", HOSTILE)
def test_hostile_tokenizers(how, llm, tmp_path, capfd):
    edit(llm / "tokenizer.json", HOSTILE[how])
    with pytest.raises(UserError) as error:
        convert("--llm", llm, "--out", tmp_path / "model")
    assert "tokenizer.json" in str(error.value) and "\n" not in str(error.value)
    assert not capfd.readouterr().err


def test_a_published_folder_given_as_a_model_is_told_what_converts_it(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}')
    with pytest.raises(UserError, match="a published model's: convert_weights.py"):
        model_folder.load(tmp_path, "cpu")
