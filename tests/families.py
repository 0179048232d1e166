"""How large are the models that the tool is for? Their published configurations, with random weights.

Full size they are what benchmark.py times; shrunk, what the tests run all six stages on. The tests
run offline, so prompts are tokenized by the demo's tokenizer. Granite's feature extractor is
torchaudio's, which is no requirement: where it is missing, MelSpectrogram below stands in.

Run     python tests/families.py              parameters and memory of each, 30 s
"""
import copy
import functools
import importlib.util
import sys
import weakref
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (AutoModelForCausalLM, AutoModelForMultimodalLM, AutoTokenizer, GenerationConfig,
                          GraniteSpeechConfig, Qwen2AudioConfig, Qwen2AudioProcessor,
                          WhisperFeatureExtractor)
from transformers.audio_utils import mel_filter_bank
from transformers.models.granite_speech import feature_extraction_granite_speech as features
from transformers.models.granite_speech.processing_granite_speech import GraniteSpeechProcessor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
scoring = import_module("02_surprisal")
training = import_module("05_train")

GRANITE_TEXT = dict(model_type="granite", num_hidden_layers=40, rms_norm_eps=1e-5, rope_theta=1e7,
                    embedding_multiplier=12.0, residual_multiplier=0.22)
GRANITE_ENCODER = dict(model_type="granite_speech_encoder", num_layers=16, hidden_dim=1024, num_heads=8,
                       context_size=200, max_pos_emb=512, input_dim=160, output_dim=256)
GRANITE_PROJECTOR = dict(model_type="blip_2_qformer", hidden_size=1024, intermediate_size=4096,
                         num_hidden_layers=2, num_attention_heads=16, encoder_hidden_size=1024,
                         cross_attention_frequency=1)
PUBLISHED = {  # text, audio encoder, projector, whether the logits' matrix is that of the embeddings
    "granite-speech-3.3-2b": (
        dict(GRANITE_TEXT, vocab_size=49160, hidden_size=2048, intermediate_size=8192,
             num_attention_heads=32, num_key_value_heads=8, attention_multiplier=1 / 64,
             logits_scaling=8.0), GRANITE_ENCODER, GRANITE_PROJECTOR, True),
    "granite-speech-3.3-8b": (
        dict(GRANITE_TEXT, vocab_size=49160, hidden_size=4096, intermediate_size=12800,
             num_attention_heads=32, num_key_value_heads=8, attention_multiplier=1 / 128,
             logits_scaling=16.0), GRANITE_ENCODER, GRANITE_PROJECTOR, True),
    "granite-4.0-1b-speech": (
        dict(GRANITE_TEXT, vocab_size=100353, hidden_size=2048, intermediate_size=4096,
             num_attention_heads=16, num_key_value_heads=4, attention_multiplier=1 / 128,
             logits_scaling=8.0, rope_theta=1e4), dict(GRANITE_ENCODER, output_dim=348),
        GRANITE_PROJECTOR, False),
    "qwen2-audio-7b": (
        dict(model_type="qwen2", vocab_size=156032, hidden_size=4096, intermediate_size=11008,
             num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32, rms_norm_eps=1e-5),
        dict(model_type="qwen2_audio_encoder", num_mel_bins=128, d_model=1280, encoder_layers=32,
             encoder_attention_heads=20, encoder_ffn_dim=5120, max_source_positions=1500), None, False)}
POSITIONS = {"granite_speech": 190, "qwen2_audio": 380}  # of a prompt with a clip of 12.5 s
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads", "num_layers", "hidden_dim", "num_heads", "encoder_hidden_size",
         "d_model", "encoder_layers", "encoder_attention_heads", "encoder_ffn_dim")
LEAST = {"vocab_size": 512, "num_hidden_layers": 2, "num_layers": 2, "encoder_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "num_heads": 2,
         "encoder_attention_heads": 2}  # 512: the demo's tokenizer

# Granite's own prints the date, unless there is a system message.
GRANITE_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}SYSTEM: Today's Date: {{ strftime_now('%B %d, %Y') }}.\n"
    "{% endif %}{% for message in messages %}{{ message['role'].upper() }}: {{ message['content'] }}\n"
    "{% endfor %}ASSISTANT:")


class MelSpectrogram(torch.nn.Module):
    """torchaudio's, as far as Granite uses it: mel (HTK) energies of a Hann window."""

    def __init__(self, sample_rate, n_fft, win_length, hop_length, n_mels):
        super().__init__()
        self.sizes = n_fft, hop_length, win_length
        filters = mel_filter_bank(n_fft // 2 + 1, n_mels, 0, sample_rate / 2, sample_rate, mel_scale="htk")
        self.register_buffer("filters", torch.tensor(filters, dtype=torch.float32).T)  # (mels, frequencies)

    def forward(self, wave):
        window = torch.hann_window(self.sizes[2], device=wave.device)
        spectrum = torch.stft(wave, *self.sizes, window, return_complex=True)
        return self.filters @ spectrum.abs().square()


def stand_in_for_torchaudio(patch=setattr):
    """Let Granite's feature extractor work where torchaudio is missing."""
    if importlib.util.find_spec("torchaudio") is None:
        mel = SimpleNamespace(transforms=SimpleNamespace(MelSpectrogram=MelSpectrogram))
        patch(features, "torchaudio", mel)
        patch(features, "requires_backends", lambda *names: None)


def shrunk(part, shrink):
    """The settings of a part, its sizes divided by `shrink`."""
    settings = dict(part)
    for key in SIZES:
        if key in part:
            settings[key] = max(LEAST.get(key, 1), part[key] // shrink)
    return settings


def published_config(name, tokenizer, shrink=1):
    """The configuration of PUBLISHED[name]; widths, layers and vocabulary divided by `shrink`."""
    text, audio, projector, tied = PUBLISHED[name]
    text = shrunk(text, shrink)
    audio = shrunk(audio, shrink)
    text |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
             "bos_token_id": None, "tie_word_embeddings": tied}
    settings = {"text_config": text, "tie_word_embeddings": tied,
                "audio_token_index": tokenizer.convert_tokens_to_ids("<|AUDIO|>")}
    if projector:
        return GraniteSpeechConfig(**settings, encoder_config=audio, has_lora_adapter=False,
                                   projector_config=shrunk(projector, shrink))
    return Qwen2AudioConfig(**settings, audio_config=audio)


def random_model(config, tokenizer, device="cpu", dtype=torch.float32):
    """A model of this configuration with random weights, in eval mode, with a list of EOS."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForMultimodalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.generation_config = GenerationConfig(
        eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id], pad_token_id=tokenizer.pad_token_id)
    return model.eval()


def family_processor(config, tokenizer):
    """The family's own processor class, around the demo's tokenizer."""
    if config.model_type == "granite_speech":
        return GraniteSpeechProcessor(features.GraniteSpeechFeatureExtractor(), tokenizer,
                                      audio_token="<|AUDIO|>", chat_template=GRANITE_TEMPLATE)
    return Qwen2AudioProcessor(WhisperFeatureExtractor(feature_size=128), tokenizer)


class LiveMemory(TorchDispatchMode):
    """Bytes of all tensors that are alive, now and at most, in blocks of 512 as a GPU hands them out."""

    def __init__(self):
        super().__init__()
        self.now = 0
        self.peak = 0
        self.known = weakref.WeakSet()

    def count(self, tensors):
        for memory in (tensor.untyped_storage() for tensor in tensors):
            if memory not in self.known:
                blocks = memory.nbytes() + -memory.nbytes() % 512
                self.known.add(memory)
                self.now += blocks
                self.peak = max(self.peak, self.now)
                weakref.finalize(memory, self.free, blocks)

    def free(self, blocks):
        self.now -= blocks

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        self.count(leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))
        return result


def memory_of_training(config, gradient_checkpointing):
    """Bytes that 05 takes at most on a GPU. Each layer takes as much as the one before, so the total
    follows from models of two and of three layers."""
    two = memory_of_layers(copy.deepcopy(config), 2, gradient_checkpointing)
    three = memory_of_layers(copy.deepcopy(config), 3, gradient_checkpointing)
    others = config.get_text_config().num_hidden_layers - 2
    return two + others * (three - two)


def memory_of_layers(config, num_layers, gradient_checkpointing, prompts_per_batch=6):
    """memory_of_training for a model of so many layers, measured on a whole update. The tensors are
    fake: they have sizes, but no numbers.

    Prompts with a clip of 12.5 s and 8 answers of 35 tokens, the first 23 of which all share.
    """
    config.get_text_config().num_hidden_layers = num_layers
    P = POSITIONS[config.model_type]
    responses = torch.arange(35).repeat(8, 1)
    responses[:, 23:] += torch.arange(8)[:, None]
    tries = [scoring.build_trie(responses, torch.full((8,), 35))] * prompts_per_batch
    one_mask = functools.cache(scoring.trie_mask)  # all prompts are alike, and fake tensors are slow
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config.get_text_config(), dtype=torch.bfloat16,
                                                 attn_implementation="sdpa").eval()
    model = training.add_lora(model.requires_grad_(False), 64, 128, 0.05)
    memory = LiveMemory()
    with FakeTensorMode(allow_non_fake_inputs=True):
        training.ready_to_train(model, gradient_checkpointing)
        model.to_empty(device="cpu").get_base_model().tie_weights()
        memory.count([*model.parameters(), *model.buffers()])
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(weights)
        embeds = torch.empty(prompts_per_batch, P, config.get_text_config().hidden_size)
        with memory:
            for weight in weights:
                weight.grad = torch.zeros_like(weight)
            optimizer.step()  # a first one, from which the moments stay
            optimizer.zero_grad()
            with patch.object(scoring, "trie_mask", one_mask):
                all_logps = scoring.batch_logps(model, list(embeds), tries)
            sum(logps.mean() for logps in all_logps).backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
    return memory.peak


def memory_of_cache(config, prompts=16, K=8, T=200):
    """Bytes of keys and values in 01, all answers as long as they may be."""
    text = config.get_text_config()
    width = text.num_key_value_heads * text.hidden_size // text.num_attention_heads
    return prompts * (POSITIONS[config.model_type] + K * T) * text.num_hidden_layers * 2 * width * 2


def print_sizes():
    """The table of tests/results.md, in bfloat16: all weights of a model; the cache of 01 at its
    longest; the peak of 05, with gradient checkpointing and without."""
    tokenizer = AutoTokenizer.from_pretrained(Path(__file__).parent / "demo" / "model")
    print(f"{'':24}{'weights':>12}{'01, cache':>12}{'05':>12}{'without':>12}")
    for name in PUBLISHED:
        config = published_config(name, tokenizer)
        model = random_model(config, tokenizer, "meta", torch.bfloat16)
        sizes = [2 * model.num_parameters(), memory_of_cache(config),
                 memory_of_training(config, gradient_checkpointing=True),
                 memory_of_training(config, gradient_checkpointing=False)]
        print(f"{name:24}" + "".join(f"{size / 1e9:9.1f} GB" for size in sizes))


if __name__ == "__main__":
    print_sizes()
