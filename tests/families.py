"""The models that the tool is for, by their published configurations, with random weights.

Full size they are what benchmark.py times; shrunk, what the tests run all six stages on. Weights
and tokenizers cannot be fetched here, so prompts are tokenized by the demo's tokenizer. Granite's
feature extractor is torchaudio's, which is no requirement: where it is missing, MelSpectrogram
below stands in.

Run     python tests/families.py              parameters and bytes of each, half a minute, 3 GB
"""
import importlib.util
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import (AutoModelForCausalLM, AutoModelForMultimodalLM, AutoTokenizer, GenerationConfig,
                          GraniteSpeechConfig, Qwen2AudioConfig, Qwen2AudioProcessor,
                          WhisperFeatureExtractor)
from transformers.audio_utils import mel_filter_bank
from transformers.models.granite_speech import feature_extraction_granite_speech as features
from transformers.models.granite_speech.processing_granite_speech import GraniteSpeechProcessor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
scoring, training = map(import_module, ("02_surprisal", "05_train"))

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


def published_config(name, tokenizer, shrink=1):
    """The configuration of PUBLISHED[name]; widths, layers and vocabulary divided by `shrink`."""
    text, audio, projector, tied = (
        part and {key: max(LEAST.get(key, 1), value // shrink) if key in SIZES else value
                  for key, value in part.items()} if isinstance(part, dict) else part
        for part in PUBLISHED[name])
    text |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
             "bos_token_id": None, "tie_word_embeddings": tied}
    settings = {"text_config": text, "tie_word_embeddings": tied,
                "audio_token_index": tokenizer.convert_tokens_to_ids("<|AUDIO|>")}
    if projector:
        return GraniteSpeechConfig(**settings, encoder_config=audio, projector_config=projector,
                                   has_lora_adapter=False)
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


def kept_for_gradient(config, layers, positions):
    """Bytes that 05 keeps for the backward pass of one prompt: a language model of full width and so
    many layers, bfloat16, LoRA of rank 64 with dropout."""
    text = config.get_text_config().to_dict() | {"num_hidden_layers": layers, "vocab_size": 512,
                                                 "layer_types": None}
    text = type(config.get_text_config())(**text)
    model = AutoModelForCausalLM.from_config(text, dtype=torch.bfloat16, attn_implementation="sdpa")
    model = training.ready_to_train(training.add_lora(model.requires_grad_(False).eval(), 64, 128, 0.05))
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept = {}

    def keep(tensor):
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in weights:
            kept[memory.data_ptr()] = memory.nbytes()
        return tensor

    depths = torch.arange(1)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        scored = scoring.trie_logps(model, torch.randn(positions - 1, text.hidden_size), depths,
                                    depths - 1, depths)
    assert scored.requires_grad
    return sum(kept.values())


def print_sizes():
    """Of the whole model, and of what 02 and 05 put on the GPU, in bfloat16; the LoRA, its gradient
    and AdamW's two moments, in float32; and what 05 keeps for each position of a pass: a position is
    a token of a prompt or of its trie, and all layers are alike."""
    tokenizer = AutoTokenizer.from_pretrained(Path(__file__).parent / "demo" / "model")
    print(f"{'':24}{'parameters':>12}{'all':>10}{'02, 05':>10}{'LoRA':>10}{'a position':>13}")
    for name in PUBLISHED:
        config = published_config(name, tokenizer)
        model = random_model(config, tokenizer, "meta", torch.bfloat16)
        whole = model.num_parameters()
        part = sum(weight.numel() for weight in {*model.get_decoder().parameters(),
                                                 *model.get_output_embeddings().parameters()})
        lora = sum(weight.numel() for weight_name, weight in
                   training.add_lora(model, 64, 128, 0.05).named_parameters() if "lora_" in weight_name)
        (a, b), (c, d) = ([kept_for_gradient(config, layers, positions) for positions in (64, 128)]
                          for layers in (1, 2))
        position = config.get_text_config().num_hidden_layers * (d - c - (b - a)) / 64
        print(f"{name:24}{whole / 1e9:10.1f} B{2 * whole / 1e9:7.1f} GB{2 * part / 1e9:7.1f} GB"
              f"{16 * lora / 1e9:7.1f} GB{position / 1e6:10.1f} MB")


if __name__ == "__main__":
    print_sizes()
