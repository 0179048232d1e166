"""Do the six stages run on the real families? Random checkpoints in Granite Speech's and Qwen2-Audio's layout.

Granite's logits are scaled, it brings a LoRA of its own, its encoder has no padding mask and its
feature extractor is torchaudio's. Qwen2-Audio hears 30 s, and its EOS is a list.
"""
import csv
import importlib.util
import json
import math
import shutil
import warnings
from importlib import import_module
from pathlib import Path

import pytest
import soundfile
import torch
from conftest import TEST, TRAIN, call, load, parsed, refusal, sampled_round, shell
from families import (MelSpectrogram, family_processor, features, memory_of_layers, memory_of_training,
                      published_config, random_model, stand_in_for_torchaudio)
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch.utils import backend_registration
from transformers import GraniteForCausalLM, GraniteSpeechForConditionalGeneration

sampling = import_module("01_sample")
scoring = import_module("02_surprisal")
training = import_module("05_train")

def build(folder, name, tokenizer, lora=False):
    """Write a tiny checkpoint of this name, in several files, with a speech LoRA beside if asked for."""
    config = published_config(name, tokenizer, shrink=64)
    model = random_model(config, tokenizer)
    for table in (model.get_input_embeddings(), model.get_output_embeddings()):
        torch.nn.init.normal_(table.weight)  # so that Granite's scale makes a difference
    model.generation_config.eos_token_id = [7, tokenizer.pad_token_id]
    model.save_pretrained(str(folder), max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    family_processor(config, tokenizer).save_pretrained(str(folder))
    if lora:
        model.config.has_lora_adapter = True
        model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight)
        with warnings.catch_warnings(action="ignore"):  # peft looks for a config there
            model.save_pretrained(str(folder / "lora"))
        shutil.move(folder / "lora" / "adapter_config.json", folder)
        shutil.copy(folder / "lora" / "config.json", folder)
        # The published file names the layers as transformers did before its version 5.
        weights = load_file(folder / "lora" / "adapter_model.safetensors")
        save_file({name.replace("model.language_model.", "language_model.model."): weight
                   for name, weight in weights.items()},
                  folder / "adapter_model.safetensors", metadata={"format": "pt"})
        shutil.rmtree(folder / "lora")


@pytest.fixture(scope="module")
def folders(tmp_path_factory, demo):
    """The checkpoints by name, where torchaudio's features are stood in for."""
    with pytest.MonkeyPatch.context() as patch:
        stand_in_for_torchaudio(lambda *change: patch.setattr(*change, raising=False))
        made = {name: tmp_path_factory.mktemp(name)
                for name in ("granite-4.0-1b-speech", "granite-speech-3.3-2b", "qwen2-audio-7b")}
        for name, folder in made.items():
            build(folder, name, demo[1].tokenizer, lora="3.3" in name)
        yield {name: str(folder) for name, folder in made.items()}


@pytest.fixture(scope="module", params=["granite-4.0-1b-speech", "granite-speech-3.3-2b", "qwen2-audio-7b"])
def family(request, folders):
    return folders[request.param]


@pytest.fixture(scope="module")
def granite(folders):
    return sampling.load_model(folders["granite-speech-3.3-2b"])


@pytest.fixture(scope="module")
def embeds(granite, examples):
    """What Granite hears of the first test clip, (P, D)."""
    return hear(granite, examples[0], "Listen: <audio> and translate.")


def hear(loaded, example, prompt):
    text = sampling.render_prompt(loaded[1], prompt)
    return sampling.embed_prompt(*loaded, sampling.load_audio(example["audio"], 16000), text)


def logits_on(model, embeds):
    with torch.no_grad():
        return sampling.logits_of(model, model.get_decoder()(inputs_embeds=embeds[None]).last_hidden_state[0])


def policy_on(folder, adapter=None, *options):
    return training.load_policy({"model": folder}, adapter,
                                parsed("05_train.py", "--device", "cpu", *options))


def small(folder):
    return ["--manifest", TRAIN, "--model", folder, "--num-prompts", 2, "--num-responses", 4,
            "--max-new-tokens", 6]


# All of them.

@pytest.mark.parametrize("family", ["granite-4.0-1b-speech"], indirect=True)
def test_the_six_stages(tmp_path, family):
    """A second round, so that the trained adapter is loaded on top of the model."""
    for turn in (1, 2):
        sampled_round(tmp_path, *small(family))
        call("05_train.py", "--run", tmp_path)
        assert load(tmp_path, "advantages")["meta"]["round"] == turn
        scores = load(tmp_path, "surprisal")["prompts"]
        agree = [torch.equal(score["logp_old"], score["logp_ref"]) for score in scores]
        assert agree == [turn == 1] * 2
    call("06_eval.py", "--run", tmp_path, "--manifest", TEST, "--num-prompts", 2, "--passes", 1,
         "--max-new-tokens", 4)
    with open(tmp_path / "eval.csv", newline="") as file:
        assert [row["method"] for row in csv.DictReader(file)] == ["base", "leaf"]


@pytest.mark.skipif(not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
                    reason="this torch knows no devices made in Python")
def test_two_rounds_on_a_pretended_gpu(tmp_path, folders):
    """No operation meets tensors of two devices, or of two types."""
    run = tmp_path / "run"
    done = shell("tests/pretended_gpu.py", folders["granite-speech-3.3-2b"], run)
    assert done.returncode == 0, done.stderr
    assert load(run, "rollouts")["prompts"][0]["embeds"].dtype == torch.bfloat16
    with open(run / "eval.csv", newline="") as file:
        assert [row["method"] for row in csv.DictReader(file)] == ["base", "leaf"]
    weights = load_file(run / "adapter" / "adapter_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert all(weight.isfinite().all() and weight.any() for weight in weights.values())


def test_only_listening_needs_the_processor(tmp_path, folders):
    """What 02 to 05 need of the checkpoint is the language model."""
    model = shutil.copytree(folders["granite-speech-3.3-2b"], tmp_path / "model")
    run = tmp_path / "run"
    call("01_sample.py", "--run", run, *small(model))
    for path in model.iterdir():
        if not path.name.startswith(("model", "config", "generation_config", "adapter")):
            path.unlink()
    assert not list(model.glob("*token*")) and not list(model.glob("*process*"))
    for script in ("02_surprisal.py", "03_tree.py", "04_advantage.py", "05_train.py"):
        call(script, "--run", run)
    assert (run / "adapter" / "adapter_model.safetensors").exists()
    assert refusal("06_eval.py", "--run", run, "--manifest", TEST).count(str(model)) >= 1


def test_only_the_language_model_goes_to_the_device(family):
    """"meta" plays the GPU; the audio tower stays where it was loaded."""
    model, processor = sampling.load_model(family, device="meta", audio=False)
    assert processor is None
    moved = {name for name, weight in model.named_parameters() if weight.device.type == "meta"}
    wanted = {name for name, weight in model.named_parameters() if "language_model" in name or "lm_head" in name}
    assert moved == wanted and any("layers" in name for name in moved)
    assert model.get_output_embeddings().weight.device.type == "meta"


def test_what_a_clip_is_heard_as_does_not_depend_on_the_others(family, examples):
    model, processor = sampling.load_model(family)
    examples = [{**example, "prompt": "Translate."} for example in examples[:3]]
    _, together = sampling.embed_examples(model, processor, examples, parsed("01_sample.py"))
    assert len({len(prompt_embeds) for prompt_embeds in together}) == 3
    for example, prompt_embeds in zip(examples, together):
        assert torch.equal(hear((model, processor), example, "Translate."), prompt_embeds)


def test_embeddings_are_those_of_the_models_own_forward(family, examples):
    """Through logits; Granite's own are not scaled, so they are compared up to a factor."""
    model, processor = sampling.load_model(family)
    text = sampling.render_prompt(processor, "Listen: <audio> and translate.")
    wave = sampling.load_audio(examples[0]["audio"], 16000)
    with torch.no_grad():
        own = model(**processor(text=text, audio=wave.numpy(), return_tensors="pt")).logits[0]
    ours = logits_on(model, sampling.embed_prompt(model, processor, wave, text))
    torch.testing.assert_close(own / own.norm(), ours / ours.norm(), atol=1e-6, rtol=1e-4)


def test_half_precision_is_heard_saved_and_scored(tmp_path, family, examples):
    """As on a GPU: weights and embeddings in bfloat16, log-probabilities in float32."""
    model, processor = sampling.load_model(family)
    wanted = hear((model, processor), examples[0], "Translate.")
    prompt_embeds = hear((model.bfloat16(), processor), examples[0], "Translate.")
    assert prompt_embeds.dtype == torch.bfloat16
    torch.testing.assert_close(prompt_embeds.float(), wanted, atol=0.1, rtol=0.1)
    torch.manual_seed(0)
    [(responses, lengths)] = sampling.sample_responses(model, [prompt_embeds], 3, 5, 1.0, 0.9)
    prompt = {"embeds": prompt_embeds, "responses": responses, "lengths": lengths}
    with torch.no_grad():
        [logps] = scoring.score_responses(model, [prompt])
        [exact] = scoring.score_responses(model.float(), [{**prompt, "embeds": prompt_embeds.float()}])
    assert logps.dtype == torch.float32
    torch.testing.assert_close(logps, exact, atol=0.15, rtol=0)


def test_the_prompt_is_shown_once_as_the_model_gets_it(tmp_path, family, capsys):
    call("01_sample.py", "--run", tmp_path, *small(family), "--system-prompt", "Be brief.")
    shown = "".join(capsys.readouterr())
    assert shown.count("<|AUDIO|>") == shown.count("Be brief.") == 1 and "Today" not in shown


def test_without_a_system_prompt_the_date_changes_the_prompt(granite):
    assert "Today's Date" in sampling.render_prompt(granite[1], "Translate.")
    assert "Today's Date" not in sampling.render_prompt(granite[1], "Translate.", "Be brief.")


# Granite.

def test_logits_are_those_of_its_text_model(granite, embeds):
    """transformers' GraniteForCausalLM divides by the scale once; so do we, whatever the speech class does."""
    model, _ = granite
    text = GraniteForCausalLM(model.config.text_config).eval()
    text.model.load_state_dict(model.get_decoder().state_dict())
    text.lm_head.load_state_dict(model.get_output_embeddings().state_dict())
    with torch.no_grad():
        wanted = text(inputs_embeds=embeds[None]).logits[0].log_softmax(dim=-1)
    ours = logits_on(model, embeds).log_softmax(dim=-1)
    torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-5)
    entropies = [-(logp.exp() * logp).sum(dim=-1).mean().item() for logp in (ours, wanted)]
    assert entropies[0] == pytest.approx(entropies[1], abs=1e-5) and entropies[0] > 4


def test_samples_and_surprisal_have_the_entropy_of_the_scaled_softmax(granite, embeds):
    """At the bare head's temperature of 1/8 there would be a fraction of it."""
    model, _ = granite
    logp = logits_on(model, embeds)[-1].log_softmax(dim=0)
    entropy = -(logp.exp() * logp).sum().item()
    deviation = ((logp.exp() * logp.square()).sum().item() - entropy ** 2) ** 0.5
    torch.manual_seed(0)
    [(responses, lengths)] = sampling.sample_responses(model, [embeds], 400, 1, 1.0, 1.0)
    rollout = {"embeds": embeds, "responses": responses, "lengths": lengths}
    with torch.no_grad():
        nats = -scoring.score_responses(model, [rollout])[0]
    assert entropy > 4 and abs(nats.mean().item() - entropy) < 5 * deviation / math.sqrt(400)


def test_its_own_lora_is_folded_in(folders, granite, embeds):
    model, _ = granite
    assert not any("lora" in name for name, _ in model.named_modules())
    shipped = GraniteSpeechForConditionalGeneration.from_pretrained(folders["granite-speech-3.3-2b"],
                                                                    dtype=torch.float32).eval()
    assert any("lora" in name for name, _ in shipped.named_modules())
    wanted = logits_on(shipped, embeds)
    torch.testing.assert_close(logits_on(model, embeds), wanted, atol=1e-4, rtol=0)
    shipped.disable_adapters()
    assert not torch.allclose(logits_on(shipped, embeds), wanted, atol=1e-2)


def test_policy_and_reference_start_as_the_model_as_shipped(family, examples):
    """Ours starts at exactly zero, and switching it off leaves the shipped one in force."""
    shipped = sampling.load_model(family)
    prompt_embeds = hear(shipped, examples[0], "Translate.")
    policy = policy_on(family)
    assert torch.equal(logits_on(policy, prompt_embeds), logits_on(shipped[0], prompt_embeds))
    learning = [name for name, weight in policy.named_parameters() if weight.requires_grad]
    assert len(learning) == 2 * 7 * 2 and all("language_model" in name for name in learning)
    for name, weight in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.2)
    assert not torch.allclose(logits_on(policy, prompt_embeds), logits_on(shipped[0], prompt_embeds), atol=1e-2)
    with policy.disable_adapter():
        assert torch.equal(logits_on(policy, prompt_embeds), logits_on(shipped[0], prompt_embeds))


@pytest.mark.skipif(importlib.util.find_spec("torchaudio") is not None, reason="torchaudio is installed")
def test_without_torchaudio_the_sentence_says_what_is_missing(tmp_path, folders, monkeypatch):
    from transformers.utils.import_utils import requires_backends
    monkeypatch.setattr(features, "requires_backends", requires_backends)
    sentence = refusal("01_sample.py", "--run", tmp_path, "--manifest", TRAIN, "--model", folders["granite-4.0-1b-speech"])
    assert "requires the torchaudio library" in sentence


def test_the_stand_in_hears_as_torchaudio_does():
    transforms = pytest.importorskip("torchaudio.transforms")
    wave = torch.randn(1, 16000, generator=torch.Generator().manual_seed(0))
    settings = dict(sample_rate=16000, n_fft=512, win_length=400, hop_length=160, n_mels=80)
    torch.testing.assert_close(MelSpectrogram(**settings)(wave), transforms.MelSpectrogram(**settings)(wave),
                               atol=0.1, rtol=1e-4)


def test_the_stand_in_hears_a_tone_where_it_is():
    """440 Hz is 549.6 mel; 80 filters over 0 to 8000 Hz (2840.0 mel) are 35.06 mel apart: number 14 or 15."""
    tone = torch.sin(2 * math.pi * 440 * torch.arange(16000) / 16000)[None]
    mel = MelSpectrogram(16000, 512, 400, 160, 80)(tone)
    assert mel.shape == (1, 80, 101) and mel[0, :, 50].argmax() in (14, 15)


# Qwen2-Audio.

def test_every_end_token_ends_a_response(folders, demo):
    model, processor = sampling.load_model(folders["qwen2-audio-7b"])
    tokenizer = processor.tokenizer
    assert model.generation_config.eos_token_id == sorted({7, tokenizer.pad_token_id, tokenizer.eos_token_id})
    assert len(model.generation_config.eos_token_id) == 3


def test_a_clip_beyond_30_seconds_is_refused_by_name(tmp_path, folders):
    lines = []
    for seconds in (2, 31):
        soundfile.write(tmp_path / f"{seconds}.wav", torch.zeros(seconds * 16000).numpy(), 16000)
        lines.append(json.dumps({"audio": f"{seconds}.wav", "prompt": "Translate.", "reference": "Ja."}))
    Path(tmp_path / "m.jsonl").write_text("\n".join(lines))
    sentence = refusal("01_sample.py", "--run", tmp_path / "run", "--manifest", tmp_path / "m.jsonl",
                       "--model", folders["qwen2-audio-7b"])
    assert "31.wav" in sentence and "31.00 s" in sentence and "30 s" in sentence
    assert not (tmp_path / "run" / "rollouts.pt").exists()


@pytest.mark.parametrize("samples", [1, 160])
def test_a_clip_that_is_too_short_is_refused_by_name(tmp_path, family, samples):
    soundfile.write(str(tmp_path / "short.wav"), torch.full((samples,), 0.1).numpy(), 16000)
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text('{"audio": "short.wav", "prompt": "Translate.", "reference": "Hallo."}')
    options = [*small(family), "--manifest", manifest]
    assert "short.wav" in refusal("01_sample.py", "--run", tmp_path / "run", *options)
    assert not list((tmp_path / "run").iterdir())


# At full size.

def test_training_takes_little_memory(demo):
    """The sum of all tensors that are alive at once: less than without checkpoints."""
    config = published_config("granite-speech-3.3-2b", demo[1].tokenizer)
    assert memory_of_training(config, True) < 12e9
    with_checkpoints, without = (memory_of_layers(config, 2, choice, prompts_per_batch=1)
                                 for choice in (True, False))
    assert with_checkpoints < without


# Models that this machine cannot take.

@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_cuda_is_refused(folders):
    with pytest.raises(sampling.UserError, match="^cannot load .* on cuda: ."):
        sampling.load_model(folders["granite-4.0-1b-speech"], device="cuda")
