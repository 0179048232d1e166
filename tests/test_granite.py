"""The other family: a tiny Granite Speech, whose logits are scaled and which brings a LoRA of its own."""
import csv
import importlib.util
import math
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from conftest import TEST, TRAIN, call, load, parsed, refusal
from peft import LoraConfig
from transformers import GraniteSpeechConfig, GraniteSpeechForConditionalGeneration
from transformers.models.granite_speech import feature_extraction_granite_speech as features
from transformers.models.granite_speech.processing_granite_speech import GraniteSpeechProcessor

sampling = import_module("01_sample")
scoring = import_module("02_surprisal")
training = import_module("05_train")

TEMPLATE = "{% for message in messages %}USER: {{ message['content'] }}\n{% endfor %}ASSISTANT:"
TEXT = dict(model_type="granite", vocab_size=512, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2, logits_scaling=8.0, tie_word_embeddings=True,
            eos_token_id=2, pad_token_id=0, bos_token_id=None)
ENCODER = dict(model_type="granite_speech_encoder", num_layers=2, hidden_dim=32, num_heads=2, output_dim=10,
               context_size=20, max_pos_emb=32)
PROJECTOR = dict(model_type="blip_2_qformer", hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                 num_attention_heads=2, encoder_hidden_size=32)


class MelSpectrogram(torch.nn.Module):
    """Stands in for torchaudio's; the filters do not matter here."""

    def __init__(self, sample_rate, n_fft, win_length, hop_length, n_mels):
        super().__init__()
        self.window = n_fft, hop_length, win_length
        self.filters = torch.rand(n_mels, n_fft // 2 + 1, generator=torch.Generator().manual_seed(0))

    def forward(self, wave):
        spectrum = torch.stft(wave, *self.window, torch.hann_window(self.window[2]), return_complex=True)
        return self.filters @ spectrum.abs().square()


@pytest.fixture(scope="module")
def granite(tmp_path_factory, demo):
    """A folder with the model, its processor and, beside the weights, a LoRA called "default"."""
    folder = tmp_path_factory.mktemp("granite")
    with pytest.MonkeyPatch.context() as patch:
        mel = SimpleNamespace(transforms=SimpleNamespace(MelSpectrogram=MelSpectrogram))
        patch.setattr(features, "torchaudio", mel, raising=False)
        patch.setattr(features, "requires_backends", lambda *names: None)
        torch.manual_seed(0)
        model = GraniteSpeechForConditionalGeneration(GraniteSpeechConfig(
            text_config=TEXT, encoder_config=ENCODER, projector_config=PROJECTOR, audio_token_index=3))
        torch.nn.init.normal_(model.get_input_embeddings().weight)  # so that the scale makes a difference
        model.generation_config.eos_token_id = 2
        model.save_pretrained(str(folder))
        model.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.2)
        model.save_pretrained(str(folder / "with_lora"))
        for path in (folder / "with_lora").glob("adapter_*"):
            path.rename(folder / path.name)
        GraniteSpeechProcessor(features.GraniteSpeechFeatureExtractor(), demo[1].tokenizer,
                               audio_token="<|AUDIO|>", chat_template=TEMPLATE).save_pretrained(str(folder))
        yield str(folder)


@pytest.fixture(scope="module")
def loaded(granite):
    return sampling.load_model(granite)


@pytest.fixture(scope="module")
def embeds(loaded, examples):
    text = sampling.render_prompt(loaded[1], "Listen: <audio> and translate.")
    return sampling.embed_prompt(*loaded, sampling.load_audio(examples[0]["audio"], 16000), text)


def logits_on(model, embeds):
    with torch.no_grad():
        return sampling.logits_of(model, model.get_decoder()(inputs_embeds=embeds[None]).last_hidden_state[0])


def test_embeddings_are_those_of_its_own_forward(loaded, embeds, examples):
    model, processor = loaded
    text = sampling.render_prompt(processor, "Listen: <audio> and translate.")
    wave = sampling.load_audio(examples[0]["audio"], 16000)
    with torch.no_grad():
        own = model(**processor(text=text, audio=wave.numpy(), return_tensors="pt")).logits[0]
    ours = logits_on(model, embeds)
    torch.testing.assert_close(own / own.norm(), ours / ours.norm(), atol=1e-6, rtol=1e-4)  # up to the scale


def test_logits_are_divided_by_the_models_scale(loaded, embeds):
    model, _ = loaded
    with torch.no_grad():
        hidden = model.get_decoder()(inputs_embeds=embeds[None]).last_hidden_state[0]
        torch.testing.assert_close(sampling.logits_of(model, hidden), hidden @ model.lm_head.weight.T / 8)


def test_samples_and_surprisal_have_the_entropy_of_the_scaled_softmax(loaded, embeds):
    """At the bare head's temperature of 1/8 there would be a fraction of it."""
    model, _ = loaded
    logp = logits_on(model, embeds)[-1].log_softmax(dim=0)
    entropy = -(logp.exp() * logp).sum().item()
    deviation = ((logp.exp() * logp.square()).sum().item() - entropy ** 2) ** 0.5
    torch.manual_seed(0)
    [(responses, lengths)] = sampling.sample_responses(model, [embeds], 400, 1, 1.0, 1.0)
    tokens, parents, depths, node = scoring.build_trie(responses, lengths)
    with torch.no_grad():
        nats = -scoring.trie_logps(model, embeds, tokens, parents, depths)[node]
    assert entropy > 4 and abs(nats.mean().item() - entropy) < 5 * deviation / math.sqrt(400)


def test_its_own_lora_is_folded_in(granite, loaded, embeds):
    model, _ = loaded
    assert not any("lora" in name for name, _ in model.named_modules())
    shipped = GraniteSpeechForConditionalGeneration.from_pretrained(granite, dtype=torch.float32).eval()
    assert any("lora" in name for name, _ in shipped.named_modules())
    wanted = logits_on(shipped, embeds)
    torch.testing.assert_close(logits_on(model, embeds), wanted, atol=1e-4, rtol=0)
    shipped.disable_adapters()
    assert not torch.allclose(logits_on(shipped, embeds), wanted, atol=1e-2)


def test_policy_and_reference_are_the_model_as_shipped(granite, loaded, embeds):
    policy = training.load_policy({"model": granite}, None, parsed("05_train.py", "--device", "cpu"))
    assert torch.equal(logits_on(policy, embeds), logits_on(loaded[0], embeds))
    with policy.disable_adapter():
        assert torch.equal(logits_on(policy, embeds), logits_on(loaded[0], embeds))
    learning = [name for name, weight in policy.named_parameters() if weight.requires_grad]
    assert len(learning) == 2 * 7 * 2 and all("language_model" in name for name in learning)


def test_the_six_stages(tmp_path, granite):
    """A second round, so that the trained adapter is loaded on top of the folded one."""
    small = ["--manifest", TRAIN, "--model", granite, "--num-prompts", 2, "--num-responses", 3,
             "--max-new-tokens", 5]
    for turn in (1, 2):
        call("01_sample.py", "--run", tmp_path, *small)
        for script in ("02_surprisal.py", "03_tree.py", "04_advantage.py", "05_train.py"):
            call(script, "--run", tmp_path)
        assert load(tmp_path, "advantages")["meta"]["round"] == turn
    call("06_eval.py", "--run", tmp_path, "--manifest", TEST, "--num-prompts", 2, "--passes", 1,
         "--max-new-tokens", 4)
    with open(tmp_path / "eval.csv", newline="") as file:
        assert [row["method"] for row in csv.DictReader(file)] == ["base", "leaf"]


@pytest.mark.skipif(importlib.util.find_spec("torchaudio") is not None, reason="torchaudio is installed")
def test_without_torchaudio_the_sentence_says_what_to_install(tmp_path, granite, monkeypatch):
    from transformers.utils.import_utils import requires_backends
    monkeypatch.setattr(features, "requires_backends", requires_backends)
    sentence = refusal("01_sample.py", "--run", tmp_path, "--manifest", TRAIN, "--model", granite)
    assert "pip install torchaudio" in sentence
