"""01: what does the model answer when it is asked K times?

Every method of the GRPO family starts here: K complete responses to each of N spoken prompts,
sampled independently from the current policy. Nothing branches: LEAF (03) finds its tree in these
responses afterwards. A rollout is a prompt with its K responses; a round is 01 to 05, once. The
audio encoder is frozen, so a clip is encoded once, here: 02 and 05 read the input embeddings of the
language model from rollouts.pt. "subtle:" marks what looks removable but has a reason.

Sizes   N prompts, K responses, T tokens, P prompt positions, S audio samples, H width, V vocabulary
Reads   a manifest (a JSON object per line: audio, prompt, reference), a model, RUN/adapter if there
Writes  RUN/rollouts.pt, per prompt: all columns of the manifest; embeds (P, H); responses (K, T)
        int64, 0 at padding; lengths (K,) int64, with the EOS token; texts (K str); ends (K, T)
        int64: the first t + 1 tokens of response k spell texts[k][:ends[k, t]]
Run     python 01_sample.py                                      demo, 2 cores: about 10 s
Differs from the paper, which samples 6 prompts for each update: here a round has N (see 05).
"""
import argparse
import fcntl
import hashlib
import json
import math
import os
import random
import re
import shutil
import sys
import unicodedata
import warnings
from contextlib import contextmanager
from pathlib import Path

import soundfile
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

def main(args):
    # Take the next prompts in the shuffled order of the manifest, and load the policy.
    manifest = read_manifest(args.manifest)
    digest = hashlib.sha256(Path(args.manifest).read_bytes()).hexdigest()[:12]
    settings = {**vars(args), "manifest_content": f"{len(manifest)} prompts, sha256 {digest}"}
    state = read_state(args.run)
    check_settings(settings, state)
    N = min(args.num_prompts, len(manifest))
    examples = [manifest[n] for n in next_slice(len(manifest), state["seen"], N, args.seed)]
    model, processor = load_model(args.model, state["adapter"], args.device)

    # Encode each prompt once, and sample K responses to it.
    examples, embeds = embed_examples(model, processor, examples, args)
    torch.manual_seed(1000 * args.seed + state["round"])  # subtle: here, since encode seeds as well
    sampled = sample_all(model, embeds, args.prompts_per_batch, args.num_responses,
                         args.max_new_tokens, args.temperature, args.top_p)

    # Write.
    rollouts = []
    for example, prompt_embeds, (responses, lengths) in zip(examples, embeds, sampled):
        texts = decode_responses(processor.tokenizer, responses, lengths)
        ends = text_ends(processor.tokenizer, responses, lengths, texts)
        rollouts.append({**example, "embeds": prompt_embeds, "responses": responses,
                         "lengths": lengths, "texts": texts, "ends": ends})
    meta = {**settings, "num_prompts": len(examples), "round": state["round"] + 1,
            "seen": state["seen"] + N, "policy_id": state["policy_id"]}
    del meta["run"], meta["device"]  # these may change
    # Later stages compare this id and refuse files made from other rollouts.
    content = repr([meta, examples, [rollout["responses"].tolist() for rollout in rollouts]])
    meta["id"] = hashlib.sha256(content.encode(errors="surrogateescape")).hexdigest()[:12]
    save_stage(args.run, "rollouts", meta, rollouts)

    # Show the first prompt, as the model reads it, and the responses to it.
    text = render_prompt(processor, examples[0]["prompt"], args.system_prompt, args.raw_prompt)
    print(f"\nRound {meta['round']}: {len(rollouts)} of {N} prompts -> {args.run}/rollouts.pt")
    print(printable(f"{text.strip()}\n  reference  {examples[0]['reference']}"))
    print(printable("\n".join(f"  response   {text}" for text in rollouts[0]["texts"])))

def sample_all(model, embeds, prompts_per_batch, K, max_new_tokens, temperature, top_p):
    """sample_responses for any number of prompts; those of similar length share a batch."""
    order = sorted(range(len(embeds)), key=lambda n: len(embeds[n]))
    P = len(embeds[order[-1]])
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    if P + max_new_tokens > limit:  # beyond it a model writes gibberish, without an error
        raise UserError(f"a prompt of {P} + --max-new-tokens {max_new_tokens} are above {limit}")
    sampled = {}
    for batch in tqdm(chunks(order, prompts_per_batch), desc="sampling", unit="batch"):
        pairs = sample_responses(model, [embeds[n] for n in batch], K, max_new_tokens,
                                 temperature, top_p)
        sampled.update(zip(batch, pairs))
    return [sampled[n] for n in range(len(embeds))]

@torch.inference_mode()
def sample_responses(model, embeds, K, max_new_tokens, temperature, top_p):
    """K sampled responses to each of N prompts: N embeds (P_i, H) -> N pairs of responses (K, T),
    0 at padding, and lengths (K,), int64. The last token is EOS, unless max_new_tokens cut it off.

    A prompt and its K responses share one row of the cache. Each step appends K columns to it, a
    token of each response; response k sees the prompt and its own column of each step. Copies of
    the row would give the same, but each step would read the prompt, mostly audio, K times."""
    from transformers import DynamicCache
    decoder = model.get_decoder()
    device = model.device
    eos = torch.tensor(model.generation_config.eos_token_id, device=device)
    N = len(embeds)
    P = max(len(prompt) for prompt in embeds)

    # Prefill, padded on the left: all end in column -1. ([:, -1:] would copy the LM head N times.)
    inputs = pad_sequence(embeds, batch_first=True, padding_side="left").to(device)  # (N, P, H)
    prompt_lengths = torch.tensor([len(prompt) for prompt in embeds], device=device)
    is_prompt = torch.arange(P, device=device) >= P - prompt_lengths[:, None]  # (N, P) bool
    cache = DynamicCache()  # subtle: a model's default may take the K columns of a step for K steps
    out = decoder(inputs_embeds=inputs, attention_mask=is_prompt, use_cache=True,
                  position_ids=(is_prompt.cumsum(dim=1) - 1).clamp(min=0), past_key_values=cache)
    logits = logits_of(model, out.last_hidden_state[:, -1])[:, None].expand(N, K, -1)

    # Decode.
    responses = torch.zeros(N, K, max_new_tokens, dtype=torch.int64, device=device)
    lengths = torch.zeros(N, K, dtype=torch.int64, device=device)
    unfinished = torch.ones(N, K, dtype=torch.bool, device=device)
    rows = torch.arange(N, device=device)  # prompts at work; ended responses go on, but unsaved
    visible = is_prompt[:, None].expand(N, K, P)  # the columns that each response sees
    own_column = torch.eye(K, dtype=torch.bool, device=device)
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
            cache.batch_select_indices(active)
        visible = torch.cat([visible, own_column.expand(len(rows), K, K)], dim=2)
        position = (prompt_lengths[rows] + t)[:, None].expand(len(rows), K)
        out = decoder(inputs_embeds=model.get_input_embeddings()(tokens), position_ids=position,
                      attention_mask=visible[:, None], past_key_values=cache, use_cache=True)
        logits = logits_of(model, out.last_hidden_state)  # (prompts in the batch, K, V)
    # subtle: clone, or torch.save writes the whole batch with every slice of it
    return [(response[:, :length.max()].clone(), length.clone())
            for response, length in zip(responses.cpu(), lengths.cpu())]

def choose_tokens(logits, temperature, top_p):
    """A token per row from the top-p nucleus: logits (R, V) -> (R,) int64; greedy at temperature 0.
    The nucleus is the most probable tokens, as few as have a mass of top_p: a token is in it if
    those more probable than it have less. So no slow sort is needed: draw from all tokens until one
    of the nucleus comes. It is distributed as the nucleus, renormalised."""
    if temperature < 1e-9:  # as good as 0, and a division by it might overflow
        return logits.argmax(dim=-1)
    probs = (logits / temperature).softmax(dim=-1)
    cdf = probs.cumsum(dim=-1)
    tokens = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    rows = torch.arange(len(logits), device=logits.device)  # those that still need a token
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

def logits_of(model, hidden):
    """Last hidden states (..., H) -> float32 logits (..., V). subtle: Granite divides its logits by
    logits_scaling, 8 or 16, but its speech class in transformers forgets to. Greedy output is the
    same without, but sampling would be at temperature 1/8."""
    logits = model.get_output_embeddings()(hidden).float()
    return logits / getattr(model.config.get_text_config(), "logits_scaling", 1.0)

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
            ends[k, t] = len(os.path.commonprefix([prefix, texts[k]]))  # half a character is "�"
    return ends

# -- Bringing a clip to the model. ---------------------------------------------------------------
def read_manifest(path):
    """The rows of a JSON-lines manifest, a list of dicts with all columns. audio gets the path of
    the manifest in front, and a missing id is the line number. UserError for a bad line."""
    with as_user_error(f"cannot read {path}"):
        content = Path(path).read_bytes()
        text = content.decode(json.detect_encoding(content), errors="surrogateescape")  # UTF-8, -16
    examples = []
    for line_number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path} line {line_number}"
        with as_user_error(f"{where} is not a JSON object"):
            row = dict(json.loads(line))
            json.dumps(row, ensure_ascii=False).encode()  # fails for bytes that are no characters
        for key in ("audio", "prompt", "reference"):
            if not isinstance(row.get(key), str) or not row[key].strip():
                raise UserError(f'{where} lacks "{key}", a string that is not empty')
        if row["prompt"].count("<audio>") > 1:
            raise UserError(f"{where} has <audio> more than once")
        for key in ("prompt", "reference"):  # ä may be one character or two: BLEU compares them
            row[key] = unicodedata.normalize("NFC", row[key])
        row_id = line_number if row.get("id") is None else row["id"]
        audio = Path(path).parent / row["audio"]
        examples.append({**row, "id": str(row_id), "audio": str(audio)})
    if not examples:
        raise UserError(f"{path} is empty: it needs a JSON object per line")
    return examples

def next_slice(total, start, count, seed):
    """The places start..start+count in an endless sequence of seeded shuffles of range(total)."""
    order = []
    for epoch in range(math.ceil((start + count) / total)):
        order += random.Random(f"{seed} {epoch}").sample(range(total), total)
    return order[start:start + count]

def check_settings(settings, state):
    """UserError if the run's adapter was trained with another model, manifest or prompt option."""
    for name in ("model", "manifest_content", "system_prompt", "raw_prompt", "seed"):
        given = str(settings[name])
        trained = str(state.get(name, given))
        normal = os.path.realpath if name == "model" else str  # a and ./a are the same folder
        if normal(given) != normal(trained):
            flag = name.removesuffix("_content").replace("_", "-")
            raise UserError(f"--{flag} is {given!r}, but the adapter was trained with {trained!r}: "
                            "go back to that, or to another --run")

def embed_examples(model, processor, examples, args):
    """The examples of a manifest that can be heard, and embed_prompt of each, a list of (P_i, H).
    One that cannot raises UserError or, with args.skip_unreadable, is named and left out."""
    heard = []
    embeds = []
    longest = 0
    for example in tqdm(examples, desc="encoding audio", unit="clip"):
        text = render_prompt(processor, example["prompt"], args.system_prompt, args.raw_prompt)
        try:
            wave = load_audio(example["audio"], feature_extractor(processor).sampling_rate)
            prompt_embeds = embed_prompt(model, processor, wave, text, example["audio"])
            if len(wave) > longest:  # a shorter one is heard to its end, too
                check_ending(model, processor, wave, text, prompt_embeds, example["audio"])
                longest = len(wave)
        except UserError as error:
            if not args.skip_unreadable:
                raise
            tqdm.write(printable(f"left out: {error}"), file=sys.stderr)
            continue
        if not heard:
            check_own_forward(model, processor, wave, text, prompt_embeds)
        heard.append(example)
        embeds.append(prompt_embeds)
    if not heard:
        raise UserError(f"none of the {len(examples)} recordings can be heard")
    return heard, embeds

def render_prompt(processor, prompt, system_prompt="", raw=False):
    """A prompt (str) as the model reads it (str): by its chat template, unless `raw`. The model's
    audio token goes where the prompt says <audio>, or first."""
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
    messages = [{"role": "system", "content": system_prompt}] if system_prompt else []
    messages.append({"role": "user", "content": content})
    with as_user_error("the chat template fails, try --raw-prompt"):  # it may know no system role
        rendered = processor.tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True)
    if audio_token not in rendered:
        raise UserError(f"the chat template leaves out {audio_token}: try --raw-prompt")
    return rendered

def load_audio(path, rate, max_seconds=3600):
    """A recording (wav, flac, ogg, mp3; any rate, any channels) as float32 mono (S,) at `rate` Hz.
    UserError for a bad one. One that was cut off may pass: see tests/check_recordings.py."""
    with (as_user_error(f"{path} is missing, corrupt, or not wav, flac, ogg or mp3", BAD_INPUT),
          open(path, "rb") as file, soundfile.SoundFile(file.fileno(), closefd=False) as sound):
        if sound.format not in ("WAV", "WAVEX", "FLAC", "OGG", "MP3"):
            raise ValueError(sound.format)
        seconds = sound.frames / sound.samplerate  # by the header: nothing is decoded yet
        if seconds > max_seconds:
            raise UserError(f"{path} lasts {seconds:.2f} s, more than {max_seconds:g} s")
        wave = torch.from_numpy(sound.read(dtype="float32", always_2d=True)).mean(dim=1)  # (S,)
    if len(wave) == 0 or not wave.isfinite().all():
        raise UserError(f"{path} is empty or corrupt: no samples, or some are NaN or infinite")
    return wave if sound.samplerate == rate else resample(wave, sound.samplerate, rate)

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

def feature_extractor(processor):
    """The part of a processor that takes the recording; Phi-4 has another name for it."""
    return getattr(processor, "feature_extractor", None) or processor.audio_processor

def encode(model, processor, wave, text):
    """The arguments of the model's own forward, tensors, for wave (S,) and its rendered prompt."""
    torch.manual_seed(0)  # VibeVoice's encoder adds noise: the same each time
    inputs = processor(text=text, audio=wave.numpy(), return_tensors="pt")
    return inputs.to(model.device, model.dtype)  # not all families cast their features to bfloat16

class StopForward(Exception):
    """Ends a forward pass before the language model, with the embeddings that would enter it."""

@torch.inference_mode()
def embed_prompt(model, processor, wave, text, name="the clip"):
    """The input embeddings of a prompt: wave (S,) float32, rendered text -> (P, H), on the CPU.
    Families merge speech and text in different ways. So the model's own forward does it, and a hook
    stops it at the language model's input or, as Phi-4 merges later, at that of its first layer.
    subtle: a clip at a time, since Granite's encoder masks no padding. UserError for a bad clip."""
    def stop(module, args, kwargs):
        embeds = args[0] if args else kwargs.get("inputs_embeds")
        if embeds is not None and embeds.is_floating_point():
            raise StopForward(embeds[0].cpu())
    decoder = model.get_decoder()
    try:
        with (decoder.register_forward_pre_hook(stop, with_kwargs=True),
              decoder.layers[0].register_forward_pre_hook(stop, with_kwargs=True),
              as_user_error(f"the model cannot encode {name}", BAD_INPUT)):  # it may be too short
            model(**encode(model, processor, wave, text))
    except StopForward as stopped:
        embeds = stopped.args[0]
    else:
        raise UserError("this model's layers take no embeddings: it cannot be trained here")
    if len(embeds) < len(processor.tokenizer(text).input_ids):  # nothing replaced the audio token
        raise UserError(f"{name} is too short: the model hears nothing of it")
    return embeds

def load_model(model, adapter=None, device="cpu", audio=True):
    """A speech LLM (folder or hub name), with our LoRA (PEFT folder) on top if given: (model,
    processor), in eval mode, bfloat16 on a GPU, float32 on a CPU. Without audio, no processor, and
    only the language model moves to the device. UserError if it fails, or a weight is missing."""
    import peft  # subtle: here, because 03 and 04 import this file and should not wait
    import transformers
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)  # of the libraries
    options = {"trust_remote_code": False}  # a model's own Python code is not run, nor asked about
    if not Path(model, "config.json").exists() and Path(model, "adapter_config.json").exists():
        raise UserError(f"{model} is an adapter: merge it into its model first (README)")
    name = f"{model} with {adapter}" if adapter else model
    with as_user_error(f"cannot load {name} on {device}"):
        dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
        config = transformers.AutoConfig.from_pretrained(model, **options)
        config = getattr(config, "thinker_config", config)  # Qwen-Omni's part that does not speak
        if "sliding_attention" in (getattr(config.get_text_config(), "layer_types", None) or []):
            raise UserError(f"{model} has layers that see a sliding window: our masks know none")
        processor = transformers.AutoProcessor.from_pretrained(model, **options) if audio else None
        auto = transformers.AutoModelForMultimodalLM
        if type(config) not in auto._model_mapping:  # Audio Flamingo 3
            auto = transformers.AutoModelForSeq2SeqLM
        network, loading = auto.from_pretrained(model, config=config, dtype=dtype,
                                                output_loading_info=True, **options)
        missing = loading["missing_keys"]
        network = fold_adapters(network).requires_grad_(False)
        needed = [network] if audio else [network.get_decoder(), network.get_output_embeddings()]
        for part in needed:
            part.to(device)
        if adapter:  # read on the CPU: PEFT would take the first GPU, whatever the device is
            network = peft.PeftModel.from_pretrained(network, str(adapter), is_trainable=True,
                                                     torch_device="cpu")
            saved = peft.load_peft_weights(str(adapter), device="cpu")
            missing = missing or saved.keys() ^ peft.get_peft_model_state_dict(network).keys()
    if missing:  # they would be drawn at random, other ones each time
        raise UserError(f"{name} lacks weights, or has others: {sorted(missing)[0]}")
    if audio:  # EOS may be a list, and the tokenizer may know one more: stop on any of them
        eos = network.generation_config.eos_token_id
        eos = eos if isinstance(eos, list) else [eos]
        eos_set = {*eos, processor.tokenizer.eos_token_id}
        network.generation_config.eos_token_id = sorted(eos_set - {None})
    return network.eval(), processor

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

# -- The model checks itself. --------------------------------------------------------------------
def check_ending(model, processor, wave, text, embeds, name):
    """UserError if the embeds (P, H) of a clip stay the same with noise for its last 0.2 s: the
    model does not hear them. Qwen2-Audio, for instance, cuts at 30 s without a warning."""
    extractor = feature_extractor(processor)
    ending = torch.rand(extractor.sampling_rate // 5) - 0.5
    other = torch.cat([wave[:-len(ending)], ending])
    if torch.equal(embeds, embed_prompt(model, processor, other, text, name)):
        raise UserError(f"{name} lasts {len(wave) / extractor.sampling_rate:.2f} s, and the model "
                        f"hears {getattr(extractor, 'chunk_length', 'fewer')} s of it")

@torch.inference_mode()
def check_own_forward(model, processor, wave, text, embeds):
    """UserError if the distribution of the token after a prompt, embeds (P, H), is not that of the
    model's own forward: it takes more than embeddings (Gemma 3n), or keeps a state (Mamba)."""
    from transformers import DynamicCache
    own = model(**encode(model, processor, wave, text)).logits[0, -1].float()
    with as_user_error("this model takes more than embeddings and a cache of keys and values"):
        hidden = model.get_decoder()(inputs_embeds=embeds[None].to(model.device), use_cache=True,
                                     past_key_values=DynamicCache()).last_hidden_state
    ours = logits_of(model, hidden[0, -1]).log_softmax(dim=-1)
    scale = getattr(model.config.get_text_config(), "logits_scaling", 1.0)
    both = torch.stack([own, own / scale]).log_softmax(dim=-1)  # it may have left the scale out
    divergence = (both.exp() * (both - ours)).sum(dim=-1).min().item()  # KL, in nats
    if not divergence < 0.1:  # right models: 0 in float32, 1e-4 in bfloat16; wrong ones: 1.7
        raise UserError(f"the next token differs from that of the model's own forward, by a KL of "
                        f"{divergence:.3f} nats: another kind of model or, if NaN, broken weights")

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

# -- Shared by all stages: files, flags and errors. Nothing about LEAF below this line. ----------
WRITTEN_BY = {"rollouts": "01_sample.py", "surprisal": "02_surprisal.py", "tree": "03_tree.py",
              "advantages": "04_advantage.py"}  # the stage files, in order
BAD_INPUT = (OSError, RuntimeError, ValueError)  # what libraries raise for it; a bug raises others

class UserError(ValueError):
    """A user's mistake, in one sentence: what is wrong, with its name, and what to do."""

@contextmanager
def as_user_error(sentence, kinds=Exception):
    """What a library raises inside becomes a UserError: the sentence, and the library's reason."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError, MemoryError):
        raise
    except kinds as error:  # each library has exceptions of its own for what it cannot read
        if "can't allocate" in str(error):  # torch has no kind of its own for a CPU's memory
            raise
        reason = " ".join(str(error).split()).rpartition("WeightsUnpickler error: ")[2]  # no advice
        raise UserError(f"{sentence}: {reason[:300]}") from error

def run_stage(main, parse_args):
    """main(parse_args()), alone in the run's folder. A user's mistake ends it with one sentence."""
    if hasattr(sys.stdout, "reconfigure"):  # each line at once, and "?" for what cannot be drawn
        sys.stdout.reconfigure(errors="replace", line_buffering=True)
    try:
        args = parse_args()
        needed = getattr(args, "manifest", args.run)
        if not os.path.exists(args.run) and not os.path.exists(needed):
            raise UserError(f"{needed!r} is not here: run 01_sample.py first, in its own folder")
        Path(args.run).mkdir(parents=True, exist_ok=True)
        folder = os.open(args.run, os.O_RDONLY)
        try:
            with as_user_error(f"another stage is at work in {args.run}", BlockingIOError):
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            main(args)
        finally:
            os.close(folder)  # and the lock is gone, as after a kill
    except KeyboardInterrupt:
        sys.exit("stopped: the files written before are complete")
    except (torch.OutOfMemoryError, MemoryError):
        sys.exit("memory is full: try fewer --prompts-per-batch, or --gradient-checkpointing (05)")
    except BrokenPipeError:  # the reader of the output, `head` for instance, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (UserError, OSError) as error:
        sys.exit(printable(f"{Path(sys.argv[0]).name}: {error}"))

def printable(text):
    """The text without control characters, which a terminal would obey; line breaks stay."""
    return re.sub(r"[\0-\t\v-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]", "·", text)

def chunks(items, size):
    """A list in pieces of `size`; the last one may be shorter."""
    return [items[i:i + size] for i in range(0, len(items), size)]

def read_lines(path):
    """The lines of the text file at `path` (a Path), none if there is none."""
    content = path.read_bytes() if path.exists() else b""
    return content.decode(errors="surrogateescape").splitlines()

def save_file(path, content):
    """Write a text (str), or anything else by torch.save, beside `path`, then rename it: after a
    kill the old file is whole. subtle: torch.save to a path ends the process on a full disk."""
    part = f"{path}.part"
    with as_user_error(f"cannot write {path}", OSError):
        with open(part, "wb") as file:
            if isinstance(content, str):
                file.write(content.encode(errors="surrogateescape"))  # bytes stay as they were read
            else:
                torch.save(content, file)
        if not isinstance(content, str):
            with as_user_error(f"{path} takes tensors, numbers, text, lists and dicts alone"):
                torch.load(part, weights_only=True, mmap=True)
        os.replace(part, path)

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
        made_from = stage["meta"]["id"], len(stage["prompts"])
    if rollouts and made_from != (rollouts["meta"]["id"], len(rollouts["prompts"])):
        raise UserError(f"{path} was made from other rollouts than {run}/rollouts.pt, which has "
                        f"{len(rollouts['prompts'])} prompts ({made_from[1]} here): {advice}")
    return stage

def read_state(run, rollouts=None):
    """Where training stands: a dict of round, step, seen (prompts used), adapter (Path or None),
    policy_id (the id of the rollouts that the adapter was trained on last), and its settings.
    UserError if the adapter is incomplete, or did not sample these `rollouts`."""
    replace_adapter(run)  # which a kill may have interrupted
    folder = Path(run) / "adapter"
    state = {"round": 0, "step": 0, "seen": 0, "policy_id": None, "adapter": None}
    if folder.exists():
        with as_user_error(f"{folder} lacks a whole training.json (delete it; merge one of yours)"):
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
