"""01: what does the model answer when it is asked K times?

Every method of the GRPO family starts here: K complete responses to each of N spoken prompts,
sampled independently from the current policy. LEAF needs nothing else. It finds its tree later, in
these same responses (03): nothing branches while sampling. The audio encoder is frozen, so a clip
is encoded once, here; 02 and 05 take the input embeddings of the language model from rollouts.pt.

Sampling is in choose_tokens and sample_responses; the rest brings a clip to the model. What all six
scripts share stands at the end. A comment "subtle:" marks a line that looks needless and is not.

Sizes   T tokens in the longest of K responses, P prompt positions, S audio samples, H hidden width,
        V vocabulary
Reads   a manifest (a JSON object per line: audio, prompt, reference), a model, RUN/adapter if there
Writes  RUN/rollouts.pt, per prompt: id, audio, prompt, reference (str); embeds (P, H); responses
        (K, T) int64, 0 at padding; lengths (K,) int64, with the EOS token; texts (K str); ends
        (K, T) int64: the first t + 1 tokens of response k spell texts[k][:ends[k, t]]
Run     python 01_sample.py                                      demo, 2 cores: about 10 s
Differs from the paper: it updates after every 6 prompts; here a round samples N of them (see 05).
"""
import argparse
import base64
import fcntl
import hashlib
import inspect
import io
import json
import math
import os
import random
import re
import shutil
import sys
import warnings
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import soundfile
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

# -- What the model hears. -----------------------------------------------------------------------
def render_prompt(processor, prompt, system_prompt="", raw=False):
    """A prompt (str) as the model reads it (str): by its chat template, unless `raw`. The model's
    audio placeholder goes where the prompt says <audio>, or first."""
    audio_token = processor.audio_token
    before, _, after = prompt.rpartition("<audio>")  # without <audio>, all of it is after
    if audio_token in before + after:
        raise UserError(f"the prompt {prompt!r} has {audio_token}: write <audio> there")
    begin = getattr(processor, "audio_bos_token", "")
    end = getattr(processor, "audio_eos_token", "")
    content = before + begin + audio_token + end + after
    template = processor.chat_template or processor.tokenizer.chat_template
    if raw or not template:
        return system_prompt + content
    if "'audio'" in template or '"audio"' in template:  # it takes parts, and places the audio token
        parts = [{"type": "text", "text": before}, {"type": "audio", "audio": "<audio>"},
                 {"type": "text", "text": after}]
        content = [part for part in parts if part.get("text") != ""]
    messages = [{"role": "user", "content": content}]
    if system_prompt:
        messages.insert(0, {"role": "system", "content": system_prompt})
    with as_user_error("the chat template fails, try --raw-prompt"):  # it may know no system role
        rendered = processor.tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True)
    if audio_token not in rendered:
        raise UserError(f"the chat template leaves out {audio_token}: try --raw-prompt")
    bos = processor.tokenizer.bos_token_id
    if processor.tokenizer(rendered).input_ids[:2] == [bos, bos]:  # the tokenizer adds one as well
        rendered = rendered.removeprefix(processor.tokenizer.bos_token)
    return rendered

class StopForward(BaseException):  # no Exception: as_user_error would take it for an error
    """Ends a forward pass before the language model, with the embeddings that would enter it."""

def encode(model, processor, wave, text):
    """The arguments of the model's own forward, tensors, for wave (S,) and its rendered prompt."""
    torch.manual_seed(0)  # VibeVoice's encoder adds noise: the same each time
    if "audio" in inspect.signature(processor.__call__).parameters:
        inputs = processor(text=text, audio=wave.numpy(), return_tensors="pt")
    else:
        inputs = encode_conversation(processor, wave, text)
    return inputs.to(model.device, model.dtype)  # not all families cast their features to bfloat16

def encode_conversation(processor, wave, text):
    """The same for Voxtral, whose processor takes a clip in a conversation only, as a file."""
    import mistral_common  # subtle: without it transformers takes a tokenizer that knows no audio
    file = io.BytesIO()
    soundfile.write(file, wave.numpy(), processor.feature_extractor.sampling_rate, format="WAV",
                    subtype="FLOAT")
    clip = {"type": "audio", "base64": base64.b64encode(file.getvalue()).decode()}
    before, after = text.split(processor.audio_token)
    parts = [{"type": "text", "text": before}, clip, {"type": "text", "text": after}]
    content = [part for part in parts if part.get("text") != ""]
    return processor.apply_chat_template([{"role": "user", "content": content}])

@torch.inference_mode()
def embed_prompt(model, processor, wave, text, name="the clip"):
    """The input embeddings of a prompt: wave (S,) float32, rendered text -> (P, H), on the CPU.
    Each family merges speech and text in its own way: its own forward does it, until a hook stops
    it before the language model or, if that merges them itself (Phi-4), before its first layer.
    subtle: a clip at a time, for Granite's encoder masks no padding. UserError, with the clip's
    name, if the model cannot hear it."""
    def stop(module, args, kwargs):
        embeds = args[0] if args else kwargs.get("inputs_embeds")
        if embeds is not None and embeds.is_floating_point():
            raise StopForward(embeds[0].cpu())
    decoder = model.get_decoder()
    try:
        with (decoder.register_forward_pre_hook(stop, with_kwargs=True),
              decoder.layers[0].register_forward_pre_hook(stop, with_kwargs=True),
              as_user_error(f"the model cannot encode {name}")):  # it may be too short
            model(**encode(model, processor, wave, text))
    except StopForward as stopped:
        embeds = stopped.args[0]
    else:
        raise UserError("this model's layers take no embeddings: it cannot be trained here")
    if len(embeds) < len(processor.tokenizer(text).input_ids):  # none in the audio token's place
        raise UserError(f"{name} is too short: the model hears nothing of it")
    return embeds

def feature_extractor(processor):
    """The part of a processor that takes the recording; Phi-4 has another name for it."""
    return getattr(processor, "feature_extractor", None) or processor.audio_processor

def check_ending(model, processor, wave, text, name, embeds):
    """UserError if the embeds (P, H) of a clip stay the same with noise for its last 0.2 s: the
    model does not hear them. Qwen2-Audio, for instance, cuts at 30 s without a warning."""
    extractor = feature_extractor(processor)
    ending = torch.rand(extractor.sampling_rate // 5) - 0.5
    other = torch.cat([wave[:-len(ending)], ending])
    if torch.equal(embeds, embed_prompt(model, processor, other, text, name)):
        limit = getattr(extractor, "chunk_length", None)
        raise UserError(f"{name} lasts {len(wave) / extractor.sampling_rate:.2f} s, and the model "
                        f"hears {f'{limit} s' if limit else 'a part'} of it")

def embed_examples(model, processor, examples, args):
    """The examples of a manifest that can be heard, and embed_prompt of each, a list of (P_i, H).
    One that cannot raises UserError or, with args.skip_unreadable, is named and left out."""
    heard = []
    embeds = []
    longest = 0
    for example in tqdm(examples, desc="encoding audio", unit="clip"):
        name = example["audio"]
        text = render_prompt(processor, example["prompt"], args.system_prompt, args.raw_prompt)
        try:
            wave = load_audio(name, feature_extractor(processor).sampling_rate)
            prompt_embeds = embed_prompt(model, processor, wave, text, name)
            if len(wave) > longest:  # a shorter one is heard to its end, too
                check_ending(model, processor, wave, text, name, prompt_embeds)
                longest = len(wave)
        except UserError as error:
            if not args.skip_unreadable:
                raise
            tqdm.write(printable(f"left out: {error}"))
            continue
        if not heard:
            check_own_forward(model, processor, wave, text, prompt_embeds)
        heard.append(example)
        embeds.append(prompt_embeds)
    if not heard:
        raise UserError(f"none of the {len(examples)} recordings can be heard")
    if len(heard) < len(examples):
        print(f"{len(examples) - len(heard)} of {len(examples)} prompts are left out")
    return heard, embeds

# -- What it answers. ----------------------------------------------------------------------------
def logits_of(model, hidden):
    """Last hidden states (..., H) -> float32 logits (..., V). subtle: Granite divides its logits by
    logits_scaling, 8 or 16, but its speech class in transformers does not, and greedy output hides
    it: that is sampling at temperature 1/8. Gemma caps its logits."""
    return scale_logits(model, model.get_output_embeddings()(hidden).float())

def scale_logits(model, logits):
    """Logits (..., V) with the scale and the cap of the language model's config."""
    config = model.config.get_text_config()
    logits = logits / getattr(config, "logits_scaling", 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    return cap * torch.tanh(logits / cap) if cap else logits

@torch.inference_mode()
def check_own_forward(model, processor, wave, text, embeds):
    """Compares the log-probabilities of the token after a prompt by the model's own forward with
    ours, on the prompt's embeds (P, H). UserError where they differ: the language model takes more
    than embeddings (Gemma 3n) or keeps more than keys and values (Mamba)."""
    from transformers import DynamicCache
    own = model(**encode(model, processor, wave, text)).logits[0, -1].float()
    with as_user_error("this model takes more than embeddings and a cache of keys and values"):
        hidden = model.get_decoder()(inputs_embeds=embeds[None].to(model.device), use_cache=True,
                                     past_key_values=DynamicCache()).last_hidden_state
    ours = logits_of(model, hidden[0, -1]).log_softmax(dim=-1)
    if ours.isnan().any():
        raise UserError("the logits are NaN: the weights of the model or its adapter are broken")
    gaps = []
    for logits in (own, scale_logits(model, own)):  # its own forward may leave the scale out
        gaps.append((logits.log_softmax(dim=-1) - ours).abs().mean().item())
    gap = min(gaps)
    if not gap < 0.06:  # right models: 1e-5 in float32, 1e-2 in bfloat16; wrong ones: 0.3
        raise UserError(f"the log-probabilities of this model differ from those of its own forward "
                        f"by {gap:.3f} nats: LEAF would train it on wrong numbers")

def choose_tokens(logits, temperature, top_p):
    """A token per row from the top-p nucleus: logits (R, V) -> (R,) int64; greedy at temperature 0.
    Instead of a slow sort of the vocabulary, a candidate is drawn from all of it, and rejected if
    the tokens more probable than it have a mass of top_p already."""
    if temperature < 1e-9:  # as good as 0, and a division by it might overflow
        return logits.argmax(dim=-1)
    probs = (logits / temperature).softmax(dim=-1)
    cdf = probs.cumsum(dim=-1)
    tokens = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    rows = torch.arange(len(logits), device=logits.device)  # those that need a token still
    while len(rows):
        drawn = torch.rand_like(cdf[:, :1]) * cdf[:, -1:]
        # right: never a token of probability 0; clamp: the product may be rounded up to the total
        candidate = torch.searchsorted(cdf, drawn, right=True).clamp(max=cdf.shape[1] - 1)
        mass_above = probs.where(probs > probs.gather(1, candidate), 0.0).sum(dim=1)
        tokens[rows] = candidate.squeeze(1)  # if rejected, the next candidate overwrites it
        rejected = (mass_above >= top_p) & (mass_above > 0)  # the most probable token always stays
        rows = rows[rejected]
        probs = probs[rejected]
        cdf = cdf[rejected]
    return tokens

def check_window(model, embeds, max_new_tokens):
    """UserError if a prompt of embeds, (P_i, H) each, and a response may exceed a sliding window
    (Gemma 4): our cache and masks know none."""
    config = model.config.get_text_config()
    layer_types = getattr(config, "layer_types", None) or []
    P = max(len(prompt) for prompt in embeds)
    if "sliding_attention" in layer_types and P + max_new_tokens > config.sliding_window:
        raise UserError(f"a prompt of {P} tokens and --max-new-tokens {max_new_tokens} exceed the "
                        f"model's window of {config.sliding_window}")

@torch.inference_mode()
def sample_responses(model, embeds, K, max_new_tokens, temperature, top_p):
    """K sampled responses to each of N prompts: N embeds (P_i, H) -> N pairs of responses (K, T)
    int64, 0 at padding, and lengths (K,) int64. A response ends with an EOS token unless
    max_new_tokens cut it. The draws are those of torch's global generator.

    The K responses share their prompt's row of the cache: a step appends K tokens to it, and a mask
    shows each response the prompt and its own tokens. Copies of the row would give the same, but
    each step would read the prompt, mostly audio, K times."""
    from transformers import DynamicCache
    check_window(model, embeds, max_new_tokens)
    decoder = model.get_decoder()
    device = model.device
    eos = torch.tensor(model.generation_config.eos_token_id, device=device)
    N = len(embeds)
    P = max(len(prompt) for prompt in embeds)

    # Prefill. Padding is on the left, at negative positions, so all prompts end in one column.
    inputs = pad_sequence(embeds, batch_first=True, padding_side="left").to(device)  # (N, P, H)
    positions = torch.stack([torch.arange(len(e) - P, len(e)) for e in embeds]).to(device)  # (N, P)
    cache = DynamicCache()  # subtle: a model's own may keep a window, and count columns for it
    out = decoder(inputs_embeds=inputs, attention_mask=positions >= 0, use_cache=True,
                  position_ids=positions.clamp(min=0), past_key_values=cache)
    logits = logits_of(model, out.last_hidden_state[:, -1:]).expand(N, K, -1)
    position = positions[:, -1:].expand(N, K)  # of the last token of each response
    visible = (positions >= 0)[:, None].expand(N, K, P)  # the columns that each response sees

    # Decode.
    responses = torch.zeros(N, K, max_new_tokens, dtype=torch.int64, device=device)
    lengths = torch.zeros(N, K, dtype=torch.int64, device=device)
    unfinished = torch.ones(N, K, dtype=torch.bool, device=device)
    rows = torch.arange(N, device=device)  # the prompts in the batch
    self_mask = torch.eye(K, dtype=torch.bool, device=device)
    for t in range(max_new_tokens):
        tokens = choose_tokens(logits.flatten(0, 1), temperature, top_p).view(-1, K)
        responses[rows, :, t] = tokens * unfinished[rows]
        lengths[rows] += unfinished[rows]
        unfinished[rows] &= ~torch.isin(tokens, eos)
        active = unfinished[rows].any(dim=1).nonzero().squeeze(1)
        if len(active) == 0 or t + 1 == max_new_tokens:
            break
        if len(active) < len(rows):  # a prompt leaves the batch with its last response
            rows = rows[active]
            tokens = tokens[active]
            visible = visible[active]
            position = position[active]
            cache.batch_select_indices(active)
        visible = torch.cat([visible, self_mask.expand(len(rows), K, K)], dim=2)
        position = position + 1
        out = decoder(inputs_embeds=model.get_input_embeddings()(tokens), position_ids=position,
                      attention_mask=visible[:, None], past_key_values=cache, use_cache=True)
        logits = logits_of(model, out.last_hidden_state)  # (prompts in the batch, K, V)
    # subtle: clone, or torch.save writes the whole batch with every slice of it
    return [(response[:, :length.max()].clone(), length.clone())
            for response, length in zip(responses.cpu(), lengths.cpu())]

def sample_all(model, embeds, prompts_per_batch, K, max_new_tokens, temperature, top_p):
    """sample_responses for any number of prompts; those of like length share a batch."""
    check_window(model, embeds, max_new_tokens)  # of all prompts, before any is sampled
    order = sorted(range(len(embeds)), key=lambda n: len(embeds[n]))
    sampled = [None] * len(embeds)
    for batch in tqdm(chunks(order, prompts_per_batch), desc="sampling", unit="batch"):
        pairs = sample_responses(model, [embeds[n] for n in batch], K, max_new_tokens,
                                 temperature, top_p)
        for n, pair in zip(batch, pairs):
            sampled[n] = pair
    return sampled

def decode_responses(tokenizer, responses, lengths):
    """The texts, K str, of responses (K, T) and lengths (K,)."""
    return [tokenizer.decode(tokens[:length], skip_special_tokens=True)
            for tokens, length in zip(responses, lengths.tolist())]

def text_ends(tokenizer, responses, lengths, texts):
    """(K, T) int64: how much of its text, in characters, the tokens 0..t of a response spell. A
    character of several tokens counts with the last of them."""
    ends = torch.zeros_like(responses)
    for k, length in enumerate(lengths.tolist()):
        for t in range(length):
            prefix = tokenizer.decode(responses[k, :t + 1], skip_special_tokens=True)
            ends[k, t] = len(os.path.commonprefix([prefix, texts[k]]))  # without half a character
    return ends

# -- The manifest and its recordings. ------------------------------------------------------------
def read_manifest(path):
    """The examples of a JSON-lines manifest: a list of dicts id, audio, prompt, reference (str);
    audio is relative to the manifest, id defaults to the line number. UserError for a bad line."""
    content = Path(path).read_bytes()
    text = content.decode(json.detect_encoding(content), errors="surrogateescape")  # UTF-8 or 16
    examples = []
    for line_number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path} line {line_number}"
        with as_user_error(f"{where}: not one JSON object per line"):
            row = dict(json.loads(line))
            json.dumps(row, ensure_ascii=False).encode()  # fails for bytes that are no characters
        for key in ("audio", "prompt", "reference"):
            if not isinstance(row.get(key), str) or not row[key].strip():
                raise UserError(f'{where} lacks "{key}", a string that is not empty')
        if row["prompt"].count("<audio>") > 1:
            raise UserError(f"{where} has <audio> more than once")
        row_id = line_number if row.get("id") is None else row["id"]
        examples.append({"id": str(row_id), "audio": str(Path(path).parent / row["audio"]),
                         "prompt": row["prompt"], "reference": row["reference"]})
    if not examples:
        raise UserError(f"{path} is empty: it needs a JSON object per line")
    return examples

def next_slice(total, start, count, seed):
    """The places start..start+count in an endless sequence of seeded shuffles of range(total)."""
    order = []
    epoch = 0
    while len(order) < start + count:
        order += random.Random(f"{seed} {epoch}").sample(range(total), total)
        epoch += 1
    return order[start:start + count]

def resample(wave, old_rate, new_rate):
    """wave (S,) at old_rate Hz -> (ceil(S new / old),) float32 at new_rate, by its spectrum."""
    divisor = math.gcd(old_rate, new_rate)
    old = old_rate // divisor
    new = new_rate // divisor
    silence = old_rate // 20  # the transform takes a signal for periodic: keep its ends apart
    blocks = math.ceil((len(wave) + silence) / old)  # so that both lengths are integers
    spectrum = torch.fft.rfft(wave.double(), n=blocks * old)[:blocks * new // 2 + 1]
    resampled = torch.fft.irfft(spectrum, n=blocks * new) * (new / old)
    return resampled[:math.ceil(len(wave) * new / old)].float()

def is_incomplete(file, sound, num_read):
    """Whether an open recording holds or promises more samples than libsndfile has read from it: it
    was cut off, its header is wrong, or another recording follows in the same file."""
    rest = file.read().strip(b"\0")  # what libsndfile, which reads from this file, has left
    file.seek(0)
    content = file.read()
    if sound.format in ("WAV", "WAVEX"):  # other chunks may follow; streams promise 2 GB or more
        promise = re.search(r"data : (\d+) \(should be", sound.extra_info)  # libsndfile's log
        return "Unknown chunk" in sound.extra_info or bool(promise and int(promise[1]) < 0x7FFFF000)
    if rest and not rest.startswith((b"TAG", b"APETAGEX")):  # an mp3 may end in tags
        return True
    if sound.format == "OGG":  # the last page must be marked as such (4), and be there to its end:
        # 26 bytes, the number of segments, their lengths, and the segments
        page = content[content.rfind(b"OggS"):]
        if not page[5] & 4 or len(page) < 27 + page[26] + sum(page[27:27 + page[26]]):
            return True
    is_guess = sound.format == "MP3" and not re.search(b"Xing|Info|VBRI", content)
    return num_read < sound.frames and not is_guess

def load_audio(path, rate, max_seconds=3600):
    """A recording (wav, flac, ogg, mp3; any rate, any channels) as float32 mono (S,) at `rate` Hz.
    UserError, naming the file, if it is missing, corrupt, incomplete or longer than max_seconds."""
    with as_user_error(f"{path} is missing, corrupt, or not wav, flac, ogg or mp3"), open(
            path, "rb") as file:
        sound = soundfile.SoundFile(file)
        if sound.format not in ("WAV", "WAVEX", "FLAC", "OGG", "MP3"):
            raise ValueError(sound.format)
        seconds = sound.frames / sound.samplerate  # by the header: nothing is decoded yet
        if seconds > max_seconds:
            raise UserError(f"{path} lasts {seconds:.2f} s, more than {max_seconds:g} s")
        samples = sound.read(dtype="float32", always_2d=True)
        if is_incomplete(file, sound, len(samples)):
            raise UserError(f"{path} is cut off, or holds more than one recording")
    wave = torch.from_numpy(samples).mean(dim=1)  # (S,)
    if len(wave) == 0 or not wave.isfinite().all():
        raise UserError(f"{path} is empty or corrupt: no samples, or some are NaN or infinite")
    if wave.abs().max() > 10:
        raise UserError(f"{path} has a sample of {wave.abs().max():g}: audio lies between -1 and 1")
    if not 1000 <= sound.samplerate <= 768000:
        raise UserError(f"{path} claims {sound.samplerate} samples a second")
    return wave if sound.samplerate == rate else resample(wave, sound.samplerate, rate)

# -- The model. ----------------------------------------------------------------------------------
def fold_adapters(model):
    """Merge adapters that came with the weights (Granite's speech LoRA) into them, in float32: ours
    must be the only one, so that switching it off gives back the model as shipped."""
    from peft.tuners.lora import LoraLayer
    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoraLayer):
            dtype = layer.get_base_layer().weight.dtype
            layer.float().merge(safe_merge=True)
            model.set_submodule(name, layer.get_base_layer().to(dtype))
    model._hf_peft_config_loaded = False  # or PEFT takes it for a model with an adapter
    vars(model).pop("peft_config", None)
    return model

def load_model(model, adapter=None, device="cpu", audio=True):
    """A speech LLM (folder or hub name), with our LoRA (PEFT folder) on top if given: (model,
    processor), in eval mode, bfloat16 on a GPU, float32 on a CPU. Without audio, no processor, and
    only the language model moves to the device. UserError if it fails, or a weight is missing."""
    import peft  # subtle: here, because 03 and 04 import this file and should not wait
    import transformers
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)  # of the libraries
    options = {"trust_remote_code": False}  # a model's own Python code is not run, nor asked about
    name = f"{model} with {adapter}" if adapter else model
    with as_user_error(f"cannot load {name} on {device}"):
        dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
        config = transformers.AutoConfig.from_pretrained(model, **options)
        config = getattr(config, "thinker_config", config)  # Qwen-Omni's part that does not speak
        processor = transformers.AutoProcessor.from_pretrained(model, **options) if audio else None
        auto = transformers.AutoModelForMultimodalLM
        if type(config) not in auto._model_mapping:  # Audio Flamingo 3
            auto = transformers.AutoModelForSeq2SeqLM
        network, loading = auto.from_pretrained(model, config=config, dtype=dtype,
                                                output_loading_info=True, **options)
        missing = loading["missing_keys"]
        network = fold_adapters(network).requires_grad_(False)
        if audio:
            network.to(device)
        else:
            network.get_decoder().to(device)
            network.get_output_embeddings().to(device)
        if adapter:  # read on the CPU: PEFT would take the first GPU, whatever the device is
            network = peft.PeftModel.from_pretrained(network, str(adapter), is_trainable=True,
                                                     torch_device="cpu")
            saved = peft.load_peft_weights(str(adapter), device="cpu")
            missing = missing or saved.keys() ^ peft.get_peft_model_state_dict(network).keys()
    if missing:  # they would be drawn at random, each time anew
        raise UserError(f"{name} lacks weights, or has others: {sorted(missing)[0]}")
    if audio:  # EOS may be a list, and the tokenizer may know one more: stop on any of them
        eos = network.generation_config.eos_token_id
        eos = eos if isinstance(eos, list) else [eos]
        eos_set = {*eos, processor.tokenizer.eos_token_id}
        network.generation_config.eos_token_id = sorted(eos_set - {None})
    return network.eval(), processor

def parse_args():
    parser = stage_parser(__doc__, prompts_per_batch=16)
    add = parser.add_argument
    add("--manifest", default="tests/demo/train.jsonl", help="JSON lines: audio, prompt, reference")
    add("--model", default="tests/demo/model", help="folder or hub name of a speech LLM")
    add("--num-prompts", type=number(int, 1), default=64, help="N, prompts in this round")
    add("--num-responses", type=number(int, 1), default=8, help="K, responses per prompt")
    add("--max-new-tokens", type=number(int, 1), default=200, help="length limit of a response")
    add("--temperature", type=number(float, 0), default=1.0, help="of the sampling; 0 = greedy")
    add("--top-p", type=number(float, 0.001, 1), default=0.9, help="mass of the sampling's nucleus")
    add("--system-prompt", default="", help="system message before each prompt")
    add("--raw-prompt", action="store_true", help="leave the model's chat template out")
    add("--seed", type=number(int, 0), default=0, help="of the prompts' order and of the sampling")
    add("--skip-unreadable", action="store_true", help="leave out recordings that cannot be heard")
    return parser.parse_args()

def main(args):
    # Read the next prompts in the shuffled order of the manifest.
    manifest = read_manifest(args.manifest)
    state = read_state(args.run)
    check_flags(args, state, ["model", "manifest", "system_prompt", "raw_prompt", "seed"])
    N = min(args.num_prompts, len(manifest))
    examples = [manifest[n] for n in next_slice(len(manifest), state["seen"], N, args.seed)]
    model, processor = load_model(args.model, state["adapter"], args.device)
    rendered = render_prompt(processor, examples[0]["prompt"], args.system_prompt, args.raw_prompt)
    print(f"The first prompt, as the model reads it:\n{printable(rendered.strip())}")

    # Encode each prompt once, and sample K responses to it.
    examples, embeds = embed_examples(model, processor, examples, args)
    torch.manual_seed(1000 * args.seed + state["round"])  # other draws in each round
    sampled = sample_all(model, embeds, args.prompts_per_batch, args.num_responses,
                         args.max_new_tokens, args.temperature, args.top_p)

    # Write.
    rollouts = []
    for example, prompt_embeds, (responses, lengths) in zip(examples, embeds, sampled):
        texts = decode_responses(processor.tokenizer, responses, lengths)
        rollouts.append({**example, "embeds": prompt_embeds, "responses": responses,
                         "lengths": lengths, "texts": texts,
                         "ends": text_ends(processor.tokenizer, responses, lengths, texts)})
    meta = {**vars(args), "num_prompts": len(examples), "round": state["round"] + 1,
            "seen": state["seen"] + N, "policy_id": state["policy_id"]}
    del meta["run"], meta["device"]
    content = repr([meta, examples, [rollout["responses"].tolist() for rollout in rollouts]])
    # Later stages keep this id, by which files of other rollouts are refused.
    meta["id"] = hashlib.sha256(content.encode()).hexdigest()[:12]
    save_stage(args.run, "rollouts", meta, rollouts)

    # Show the responses to the first prompt.
    print(f"\nRound {meta['round']}: {len(rollouts)} prompts, sampled -> {args.run}/rollouts.pt")
    print(printable(f"  {examples[0]['prompt']}\n  reference  {examples[0]['reference']}"))
    print(printable("\n".join(f"  response   {text}" for text in rollouts[0]["texts"])))

# -- Shared by all stages: files, flags and errors. Nothing about LEAF below this line. ----------

# The stage files, in order.
WRITTEN_BY = {"rollouts": "01_sample.py", "surprisal": "02_surprisal.py", "tree": "03_tree.py",
              "advantages": "04_advantage.py"}

class UserError(ValueError):
    """A user's mistake, in one sentence: what is wrong, with its name, and what to do."""

@contextmanager
def only_stage(run):
    """Keeps other stages out of a run's folder while this one is at work there."""
    if not run:
        raise UserError("--run is empty: name a folder")
    Path(run).mkdir(parents=True, exist_ok=True)
    if not os.access(run, os.W_OK):
        raise UserError(f"nothing can be written into {run}")
    descriptor = os.open(run, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another stage is at work in {run}: wait for its end") from error
        yield
    finally:
        os.close(descriptor)

@contextmanager
def as_user_error(sentence):
    """What a library raises inside becomes a UserError: the sentence, and the library's reason."""
    try:
        yield
    except Exception as error:  # each library has exceptions of its own for what it cannot read
        if isinstance(error, UserError) or memory_is_full(error):
            raise
        raise UserError(f"{sentence}: {reason(error)}") from error

def reason(error):
    """What a library says, on one line, with the packages that it misses."""
    text = " ".join(str(error).split()).rstrip(".")
    optional = ("torchaudio", "torchvision", "pillow", "mistral_common", "soxr")
    missing = " ".join(package for package in optional if package in text.lower())
    return f"{text}: pip install {missing}" if missing else text

def memory_is_full(error):
    """Whether an exception says so: torch has a kind for the GPU, but none for the CPU."""
    is_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return is_memory or "can't allocate" in str(error)

def run_stage(main, parse_args):
    """main(parse_args()), where a user's mistake ends the script with a sentence, no traceback."""
    sys.stderr = sys.stderr or open(os.devnull, "w")  # None if the caller closed it
    try:
        args = parse_args()
        with only_stage(args.run), redirect_stdout(Output(sys.stdout or open(os.devnull, "w"))):
            main(args)
    except KeyboardInterrupt:
        sys.exit("stopped: the files written before are complete")
    except (UserError, OSError) as error:
        sys.exit(printable(f"{Path(sys.argv[0]).name}: {error}"))
    except (RuntimeError, MemoryError) as error:
        if not memory_is_full(error):
            raise
        sys.exit("memory is full: take fewer --prompts-per-batch, in 05 --gradient-checkpointing, "
                 "or a smaller model")

class Output:
    """A standard output that shows each text at once, in a log file too. It neither ends a stage
    when its reader, `head` for instance, has read enough, nor fails for what it cannot draw."""

    def __init__(self, file):
        self.file = file
        if hasattr(file, "reconfigure"):
            file.reconfigure(errors="replace")

    def write(self, text):
        try:
            self.file.write(text)
            self.file.flush()
        except BrokenPipeError:  # from now on into nothing
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())

    def __getattr__(self, name):
        return getattr(self.file, name)

def printable(text):
    """The text without what a terminal would obey: control characters, other directions of writing.
    Line breaks stay."""
    return re.sub(r"[\0-\t\v-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]", "·", text)

def chunks(items, size):
    """A list in pieces of `size`; the last one may be shorter."""
    return [items[i:i + size] for i in range(0, len(items), size)]

def read_lines(path):
    """The lines of the text file at `path` (a Path), none if there is none. Bytes that are not
    UTF-8 become �."""
    if not path.exists():
        return []
    return path.read_text(encoding="utf-8", errors="replace").splitlines()

def save_file(path, content):
    """Write a text (str), or anything else by torch.save, beside `path`, then rename it: a kill or
    a full disk leaves the old file whole. subtle: given a path instead of an open file, torch.save
    ends the whole process on a full disk."""
    part = Path(f"{path}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(part, "wb") as file:
            if isinstance(content, str):
                file.write(content.encode())
            else:
                torch.save(content, file)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        part.unlink(missing_ok=True)
        # torch's RuntimeError has the OSError, which names the cause, for its context.
        cause = error if isinstance(error, OSError) else error.__context__ or error
        raise UserError(f"cannot write {path}: {cause}") from error

def save_stage(run, name, meta, prompts):
    """Write RUN/name.pt, a dict {"meta": dict, "prompts": [dict per prompt]}. What later stages
    made of an earlier one is deleted: it no longer fits."""
    save_file(f"{run}/{name}.pt", {"meta": meta, "prompts": prompts})
    stages = list(WRITTEN_BY)
    for later in stages[stages.index(name) + 1:]:
        Path(f"{run}/{later}.pt").unlink(missing_ok=True)

def load_stage(run, name, rollouts=None):
    """Read RUN/name.pt. UserError if it is missing, corrupt, or not made from these `rollouts`."""
    path = Path(run) / f"{name}.pt"
    advice = f"run {WRITTEN_BY[name]} with --run {run}"
    if not path.exists():
        raise UserError(f"{path} is missing: {advice}")
    with as_user_error(f"{path} is incomplete or corrupt ({advice})"):
        stage = torch.load(path, weights_only=True, mmap=True)  # mmap: read where it is used
        made_from = stage["meta"]["id"]
    if rollouts:
        same_length = len(stage["prompts"]) == len(rollouts["prompts"])
        if made_from != rollouts["meta"]["id"] or not same_length:
            raise UserError(f"{path} was made from other rollouts than {run}/rollouts.pt: {advice}")
    return stage

def read_state(run, rollouts=None):
    """Where training stands: a dict of round, step, seen (prompts used), policy_id (the id of the
    rollouts that the adapter was trained on last), adapter (Path or None), and the settings that it
    was trained with. UserError if the adapter is incomplete, or did not sample these `rollouts`.
    Before, it finishes the replacement of an adapter that a kill interrupted."""
    replace_adapter(run)
    folder = Path(run) / "adapter"
    state = {"round": 0, "step": 0, "seen": 0, "policy_id": None, "adapter": None}
    if folder.exists():
        with as_user_error(f"{folder} lacks a complete training.json (delete it to start over)"):
            state |= {**json.loads((folder / "training.json").read_text()), "adapter": folder}
    if rollouts and rollouts["meta"].get("policy_id") != state["policy_id"]:
        raise UserError(f"{run}/rollouts.pt was not sampled by {folder}: run 01_sample.py first")
    return state

def replace_adapter(run):
    """Puts RUN/adapter.part in the place of RUN/adapter, if it is complete."""
    part = Path(run) / "adapter.part"
    if (part / "training.json").exists():  # 05 writes it last
        shutil.rmtree(Path(run) / "adapter", ignore_errors=True)
        part.rename(Path(run) / "adapter")

def check_flags(args, state, names):
    """Raises UserError if one of these flags is not what the run's adapter was trained with."""
    for name in names:
        if name not in state or name not in args:
            continue
        trained = str(state[name])
        given = str(getattr(args, name))
        if os.path.realpath(given) != os.path.realpath(trained):  # a and ./a are the same folder
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} is {given!r}, but {state['adapter']} was trained with "
                            f"{trained!r}: go back to that, or to another --run")

def number(kind, low, high=10**9):
    """An argparse type: an int or a float from low to high."""
    def parse(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
        return kind(text)
    parse.__name__ = kind.__name__  # argparse says "invalid int value"
    return parse

def stage_parser(doc, prompts_per_batch=None):
    """A parser with the options that stages share; prompts_per_batch is for those with a model."""
    parser = argparse.ArgumentParser(description=(doc or "").split("\n")[0],  # none with -OO
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--run", default="runs/demo", help="folder of this run")
    if prompts_per_batch:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        parser.add_argument("--device", default=device, help="cpu or cuda")
        parser.add_argument("--prompts-per-batch", type=number(int, 1), default=prompts_per_batch,
                            help="prompts in a pass")
    return parser

if __name__ == "__main__":
    run_stage(main, parse_args)
