"""Stage 1: what does the model answer when it is asked K times?

Every method of the GRPO family starts here: K complete responses per spoken prompt, sampled
independently from the current policy. LEAF needs nothing else; stage 3 finds its tree in these
same responses. The speech is heard once: audio encoder and projector are frozen, so this stage
stores what the language model gets to hear, `embeds`, and the later ones never touch audio.

Reads   a manifest (one JSON object a line: audio, prompt, reference), a model, RUN/adapter if there
Writes  RUN/rollouts.pt, per prompt: id, audio, prompt, reference; embeds (P, D), the model's dtype;
        responses (K, T) int64, 0 at padding; lengths (K,) int64; texts (K str);
        ends (K, T) int64, the number of characters of the text that tokens 0..t spell
Run     python 01_sample.py                                      demo, 2 cores: about 10 s
        python 01_sample.py --manifest mine.jsonl --model Qwen/Qwen2-Audio-7B-Instruct --run runs/a
"""
import argparse
import gc
import hashlib
import json
import math
import os
import random
import sys
import time
import warnings
from itertools import islice
from pathlib import Path

# subtle: not searching what is imported for garbage saves a quarter of a second or more a stage; so
# the other stages import this file before torch.
gc.disable()
import soundfile
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
gc.freeze()
gc.enable()

# Mistakes, files and where training stands: shared by all stages.

WRITER = {"rollouts": "01_sample.py", "surprisal": "02_surprisal.py", "tree": "03_tree.py",
          "advantages": "04_advantage.py"}

class BadInput(ValueError):
    """A user's mistake, told in one sentence: what is wrong, with its name, and what to do."""

def run_stage(main, parse_args):
    """main(parse_args()), where a user's mistake ends the script with a sentence, not a trace."""
    if hasattr(sys.stdout, "reconfigure"):  # not every terminal can draw a tree
        sys.stdout.reconfigure(errors="replace")
    try:
        main(parse_args())
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        sys.exit("stopped: the files written before are whole")
    except torch.OutOfMemoryError:
        sys.exit("the GPU's memory is full: take fewer --prompts-per-batch or a smaller model")
    except (BadInput, OSError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")

def write_file(path, write):
    """Let write(file) fill a file beside `path`, then rename it: a kill or a full disk leaves the
    old file whole."""
    path, part = Path(path), Path(f"{path}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            write(file)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        part.unlink(missing_ok=True)
        cause = error if isinstance(error, OSError) else error.__context__  # torch speaks up later
        raise BadInput(f"cannot write {path}: {getattr(cause, 'strerror', error)}") from error

def save_text(path, text):
    """A text file, in UTF-8, through write_file."""
    write_file(path, lambda file: file.write(text.encode()))

def save_tensors(path, content):
    """torch.save through write_file. subtle: to an open file; given a path, torch would abort."""
    write_file(path, lambda file: torch.save(content, file))

def save_stage(run, name, meta, prompts):
    """Write RUN/name.pt, a dict {"meta": dict, "prompts": [dict per prompt]}."""
    save_tensors(Path(run) / f"{name}.pt", {"meta": meta, "prompts": prompts})

def load_stage(run, name, rollouts=None):
    """Read RUN/name.pt; with `rollouts` given, it must have been made from these.

    Raises BadInput, naming the stage to run, if it is missing, cut off or of another round.
    """
    path, again = Path(run) / f"{name}.pt", f"run {WRITER[name]} with --run {run}"
    if not path.exists():
        raise BadInput(f"there is no {path} yet: {again} first")
    try:
        stage = torch.load(path, weights_only=True, mmap=True)  # read where used
        made_from, _ = stage["meta"]["id"], stage["prompts"]
    except Exception as error:  # torch raises many kinds for a file that is not whole
        raise BadInput(f"{path} is cut off or no stage file: {again} again") from error
    if rollouts and made_from != rollouts["meta"]["id"]:
        raise BadInput(f"{path} was made from rollouts {made_from}, but {run}/rollouts.pt is "
                       f"{rollouts['meta']['id']}: {again} again")
    return stage

def read_state(run, meta=None):
    """Where training stands: dict of round, step, seen (prompts used so far), adapter (path, None).

    meta: of rollouts to be used; BadInput unless the adapter as it is now has sampled them.
    """
    folder, previous = Path(run) / "adapter", Path(run) / "adapter.previous"
    state = {"round": 0, "step": 0, "seen": 0, "adapter": None}
    if previous.exists() and not folder.exists():  # 05 was killed between its two renames
        previous.rename(folder)
    if folder.exists():
        try:
            state |= {**json.loads((folder / "training.json").read_text()), "adapter": folder}
            if not {"model", "method"} <= state.keys():
                raise ValueError
        except (OSError, ValueError, TypeError) as error:
            raise BadInput(f"{folder} has no whole training.json: move it away") from error
    if meta and meta.get("policy") != state.get("trained_on"):
        raise BadInput(f"{run}/rollouts.pt, of round {meta['round']}, was not sampled by {folder}, "
                       f"trained up to round {state['round']}: run 01_sample.py for the next round")
    return state

# The manifest and its recordings.

def read_manifest(path):
    """The examples of a JSON-lines manifest, a list of dicts id, audio, prompt, reference (str).

    `audio` is relative to the manifest; `id` defaults to the line number. Raises BadInput, with
    the number, for a line that is no such object, and for a manifest without any.
    """
    path, examples = Path(path), []
    if not path.is_file():
        raise BadInput(f"there is no manifest {path}")
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False).encode()  # half a character could not be written
        except ValueError as error:
            raise BadInput(f"{path} line {number} is not JSON: {error}") from error
        for key in ("audio", "prompt", "reference"):
            value = row.get(key) if isinstance(row, dict) else None
            if not isinstance(value, str) or not value.strip():
                raise BadInput(f'{path} line {number} lacks "{key}", a string that is not empty')
        if row["prompt"].count("<audio>") > 1:
            raise BadInput(f"{path} line {number} has <audio> more than once, but one recording")
        name = number if row.get("id") is None else row["id"]
        examples.append({"id": str(name), "audio": str(path.parent / row["audio"]),
                         "prompt": row["prompt"], "reference": row["reference"]})
    if not examples:
        raise BadInput(f"{path} is empty: it needs a JSON object a line")
    return examples

def resample(wave, old_rate, new_rate):
    """wave (S,) at old_rate Hz -> (ceil(S new / old),) at new_rate: its spectrum, cut or extended.

    The Fourier transform takes a signal for periodic; 50 ms of silence keep end from beginning.
    """
    old, new = (rate // math.gcd(old_rate, new_rate) for rate in (old_rate, new_rate))
    blocks = math.ceil((len(wave) + old_rate // 20) / old)  # so that both lengths are integers
    spectrum = torch.fft.rfft(wave.double(), n=blocks * old)[:blocks * new // 2 + 1]
    out = torch.fft.irfft(spectrum, n=blocks * new) * (new / old)
    return out[:math.ceil(len(wave) * new / old)].float()

def load_audio(path, rate, max_seconds=math.inf):
    """A recording (wav, flac, ogg, mp3; any rate, any channels) as float32 mono (S,) at `rate` Hz.

    Raises BadInput, naming the file, if it is missing, empty, corrupt or longer than max_seconds.
    """
    if not Path(path).is_file():
        raise BadInput(f"there is no recording {path}")
    try:
        wave, file_rate = soundfile.read(str(path), dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, TypeError) as error:  # TypeError: named like headerless audio
        raise BadInput(f"{path} is corrupt, or no recording (wav, flac, ogg, mp3)") from error
    wave = torch.from_numpy(wave).mean(dim=1)  # (S,)
    if len(wave) == 0 or not wave.isfinite().all():
        raise BadInput(f"{path} is empty or corrupt: no samples, or some that are no numbers")
    if len(wave) > max_seconds * file_rate:
        raise BadInput(f"{path} lasts {len(wave) / file_rate:.2f} s, but the model hears only "
                       f"{max_seconds:g} s: shorten it or leave it out")
    return wave if file_rate == rate else resample(wave, file_rate, rate)

# The model.

def fold_adapters(model):
    """Merge adapters that came with the weights (Granite's speech LoRA) into them, in float32.

    Ours must be the only one: switching it off has to give back the whole model as shipped.
    """
    from peft.tuners.lora import LoraLayer
    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoraLayer):
            base, dtype = layer.get_base_layer(), layer.get_base_layer().weight.dtype
            layer.float().merge(safe_merge=True)
            model.set_submodule(name, base.to(dtype))
    if getattr(model, "peft_config", None):
        model._hf_peft_config_loaded = False
        del model.peft_config
    return model

def machine_memory():
    """Bytes; infinity where the system does not say."""
    names = "SC_PHYS_PAGES", "SC_PAGE_SIZE"
    return math.prod(map(os.sysconf, names)) if hasattr(os, "sysconf") else math.inf

def load_model(model, adapter=None, device="cpu", hear=True):
    """Load a speech LLM, with our LoRA on top if given: (model, processor), in eval mode.

    model: folder or hub name; adapter: PEFT folder or None. Weights are bfloat16 on a GPU, float32
    on a CPU. hear=False is for stages without audio: only the language model moves to the device,
    and the processor is None. Raises BadInput if the model or the adapter cannot be loaded.
    """
    # subtle: imported here, because stages 3 and 4 import this file and should not wait for them
    import transformers
    from peft import PeftModel
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        on_cpu = torch.empty(0, device=device).device.type == "cpu"
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"torch finds no --device {device} here: take --device cpu") from error
    if not Path(model).is_dir() and model.count("/") != 1:  # no folder, and no hub name either
        raise BadInput(f"there is no model folder {model}")
    try:
        auto = transformers.AutoModelForMultimodalLM
        with torch.device("meta"):  # its size, before anything large is loaded or downloaded
            size = auto.from_config(transformers.AutoConfig.from_pretrained(model)).num_parameters()
        if on_cpu and 4 * size > machine_memory():
            raise MemoryError(f"{size / 1e9:.1f} billion parameters need {4 * size / 1e9:.0f} GB "
                              "on a CPU, more than there is: take a GPU, --device cuda")
        processor = transformers.AutoProcessor.from_pretrained(model) if hear else None
        lm = auto.from_pretrained(model, dtype=torch.float32 if on_cpu else torch.bfloat16,
                                  attn_implementation="sdpa")
    except Exception as error:  # each library has kinds of its own for files that are not whole
        why = " ".join(str(error).split()).split(". ")[0]
        why += ": accept its terms on its page, then `hf auth login`" if "gated" in why else ""
        why += ": pip install torchaudio" if "torchaudio" in why else ""  # for Granite's features
        raise BadInput(f"no speech model could be loaded from {model}: {why}") from error
    lm = fold_adapters(lm).requires_grad_(False)
    if hear:  # EOS may be a list, and the tokenizer may know one more: stop on any of them
        eos = lm.generation_config.eos_token_id
        eos = set(eos if isinstance(eos, list) else [eos]) | {processor.tokenizer.eos_token_id}
        lm.generation_config.eos_token_id = sorted(eos - {None})
    for part in [lm] if hear else [lm.get_decoder(), lm.get_output_embeddings()]:
        part.to(device)
    try:
        if adapter:  # read on the CPU: PEFT would take the first GPU, whatever the device is
            lm = PeftModel.from_pretrained(lm, str(adapter), is_trainable=True, torch_device="cpu")
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise BadInput(f"{adapter} is not whole, or no adapter of {model}: move it away to start "
                       "anew") from error
    return lm.eval(), processor

def logits_of(model, hidden):
    """The language model's last hidden states (..., D) -> float32 logits (..., V).

    subtle: Granite divides its logits by logits_scaling (8, for the 8B model 16), and its speech
    class in transformers forgets to. Sampling from those is sampling at temperature 1/8, and greedy
    output hides it.
    """
    scale = getattr(model.config.get_text_config(), "logits_scaling", 1.0)
    return model.get_output_embeddings()(hidden).float() / scale

def render_prompt(processor, prompt, system_prompt="", raw=False):
    """The text for the model, its audio placeholder where the prompt says <audio>, or first."""
    if processor.audio_token in prompt.replace("<audio>", ""):
        raise BadInput(f"the prompt {prompt!r} has {processor.audio_token}: write <audio> there")
    before, after = prompt.split("<audio>") if "<audio>" in prompt else ("", prompt)
    marks = (getattr(processor, f"audio_{end}_token", "") for end in ("bos", "eos"))
    whole = before + processor.audio_token.join(marks) + after
    template = processor.chat_template or processor.tokenizer.chat_template
    if raw or not template:
        return system_prompt + whole
    if "'audio'" in template or '"audio"' in template:  # it writes the placeholder itself
        texts = [[{"type": "text", "text": text}] if text else [] for text in (before, after)]
        whole = texts[0] + [{"type": "audio"}] + texts[1]
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    return processor.tokenizer.apply_chat_template(
        [*system, {"role": "user", "content": whole}], chat_template=template, tokenize=False,
        add_generation_prompt=True)

class AtTheDoor(Exception):
    """Carries what arrives at the language model."""

@torch.inference_mode()
def embed_prompt(model, processor, wave, text):
    """What the language model hears: wave (S,) and rendered text -> embeddings (P, D) on the CPU.

    Each family merges speech and text in its own way, so its own forward does it, and a hook stops
    it at the language model's door. subtle: one clip at a time; Granite's encoder has no padding
    mask, so what a clip is batched with would change what is heard.
    """
    def stop(module, args, kwargs):
        raise AtTheDoor(kwargs["inputs_embeds"][0])

    hook = model.get_decoder().register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model(**processor(text=text, audio=wave.numpy(), return_tensors="pt").to(model.device))
    except AtTheDoor as arrived:
        return arrived.args[0].cpu()
    finally:
        hook.remove()

def embed_examples(model, processor, examples, system_prompt, raw):
    """embed_prompt for each example, one (P_i, D) after the other."""
    extractor = getattr(processor, "feature_extractor", None) or processor.audio_processor
    longest = getattr(extractor, "chunk_length", math.inf)  # Qwen2-Audio would cut there silently
    for example in tqdm(examples, desc="listening", unit="clip"):
        wave = load_audio(example["audio"], extractor.sampling_rate, longest)
        text = render_prompt(processor, example["prompt"], system_prompt, raw)
        yield embed_prompt(model, processor, wave, text)

def to_disk(tensors, folder):
    """The same tensors, but in a file whose name is gone, and read when they are used: memory does
    not grow with the number of prompts (on Windows, which keeps such files, it does)."""
    path = Path(folder) / "embeds.pt"
    save_tensors(path, tensors)
    tensors = torch.load(path, weights_only=True, mmap=os.name != "nt")
    path.unlink()
    return tensors

# Sampling.

def choose_tokens(logits, temperature, top_p):
    """A token per row of logits (R, V), from the top-p nucleus; at temperature 0 the likeliest.

    Sorting a vocabulary is slow, so a token is drawn from all of it, and drawn again if it lies
    outside of the nucleus: if the tokens likelier than it already have a share of top_p.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    probs = (logits / temperature).softmax(dim=-1)
    sums, tokens = probs.cumsum(dim=-1), torch.zeros_like(probs[:, 0], dtype=torch.int64)
    rows = torch.arange(len(probs), device=probs.device)  # those that still need a token
    while len(rows):
        drawn = torch.rand_like(sums[:, :1]) * sums[:, -1:]
        place = torch.searchsorted(sums, drawn, right=True).clamp(max=sums.shape[1] - 1)
        likelier = probs.where(probs > probs.gather(1, place), 0.0).sum(dim=1)
        tokens[rows] = place.squeeze(1)
        again = (likelier >= top_p) & (likelier > 0)  # the likeliest stays, whatever top_p is
        rows, probs, sums = rows[again], probs[again], sums[again]
    return tokens

@torch.inference_mode()
def sample_responses(model, embeds, K, max_new_tokens, temperature, top_p):
    """K sampled responses to each of N prompts, all decoded together from one prefill per prompt.

    embeds: N tensors (P_i, D). Returns N pairs: responses (K, T) int64, 0 at padding, T the longest
    of the K; lengths (K,) int64. A response ends with an EOS token unless max_new_tokens cut it.
    The draws are those of torch's global random generator.

    The K responses share their prompt's row of the cache: a step feeds K tokens to it, and the mask
    shows each its prompt and its own response. Repeating the cache K times would give the same, and
    copy the prompt, most of it audio, K times a step.
    """
    decoder, embed, device = model.get_decoder(), model.get_input_embeddings(), model.device
    eos = torch.tensor(model.generation_config.eos_token_id, device=device)
    N, P = len(embeds), max(len(e) for e in embeds)

    # Prefill each prompt once, padded on the left so that all end in the same column.
    inputs = pad_sequence(embeds, batch_first=True, padding_side="left").to(device)  # (N, P, D)
    padding = torch.tensor([[P - len(e)] for e in embeds], device=device)
    positions = torch.arange(P, device=device) - padding  # (N, P)
    mask = positions >= 0
    out = decoder(inputs_embeds=inputs, attention_mask=mask, position_ids=positions.clamp(min=0),
                  use_cache=True)
    cache, position = out.past_key_values, positions[:, -1:].expand(N, K)
    logits = logits_of(model, out.last_hidden_state[:, -1:]).expand(N, K, -1)
    sees = mask[:, None].expand(N, K, P)  # which column of the cache each response may look at

    responses = torch.zeros(N, K, max_new_tokens, dtype=torch.int64, device=device)
    lengths = torch.zeros(N, K, dtype=torch.int64, device=device)
    going = torch.ones(N, K, dtype=torch.bool, device=device)
    prompts, own = torch.arange(N, device=device), torch.eye(K, dtype=torch.bool, device=device)
    for t in range(max_new_tokens):
        tokens = choose_tokens(logits.flatten(0, 1), temperature, top_p).view(-1, K)
        responses[prompts, :, t] = tokens * going[prompts]
        lengths[prompts] += going[prompts]
        going[prompts] &= ~torch.isin(tokens, eos)
        on = going[prompts].any(dim=1).nonzero().squeeze(1)
        if len(on) == 0 or t + 1 == max_new_tokens:
            break
        if len(on) < len(prompts):  # prompts whose responses have all ended leave the batch
            prompts, tokens, sees, position = prompts[on], tokens[on], sees[on], position[on]
            cache.batch_select_indices(on)
        sees, position = torch.cat([sees, own.expand(len(on), K, K)], dim=2), position + 1
        out = decoder(inputs_embeds=embed(tokens), attention_mask=sees[:, None],
                      position_ids=position, past_key_values=cache, use_cache=True)
        logits = logits_of(model, out.last_hidden_state)  # (N still going, K, V)

    responses, lengths = responses.cpu(), lengths.cpu()
    # subtle: clone, or torch.save writes the whole batch with every slice of it
    return [(responses[n, :, :lengths[n].max()].clone(), lengths[n].clone()) for n in range(N)]

def chunks(items, size):
    """A list in pieces of `size`; the last one may be shorter."""
    return [items[i:i + size] for i in range(0, len(items), size)]

def sample_all(model, embeds, prompts_per_batch, *settings):
    """sample_responses over any number of prompts, those of like length together to pad little."""
    order, sampled = sorted(range(len(embeds)), key=lambda n: len(embeds[n])), {}
    for batch in tqdm(chunks(order, prompts_per_batch), desc="sampling", unit="batch"):
        sampled.update(zip(batch, sample_responses(model, [embeds[n] for n in batch], *settings)))
    return [sampled[n] for n in range(len(embeds))]

def spell(tokenizer, responses, lengths):
    """The text of each response (K str), and ends (K, T): how much of it tokens 0..t spell.

    subtle: a character of several bytes may span tokens; it counts with the one that completes it.
    """
    texts, ends = [], torch.zeros_like(responses)
    for row, end, length in zip(responses, ends, lengths.tolist()):
        so_far = [tokenizer.decode(row[:t + 1], skip_special_tokens=True) for t in range(length)]
        texts.append(so_far[-1])
        for t, text in enumerate(so_far):
            end[t] = len(os.path.commonprefix([text, texts[-1]]))
    return texts, ends

def next_slice(total, start, count, seed):
    """Places start..start+count in an endless sequence of seeded shuffles of range(total)."""
    order = []
    for epoch in range((start + count - 1) // total + 1):
        order += random.Random(f"{seed} {epoch}").sample(range(total), total)
    return order[start:start + count]

def limited(kind, low, high=10**9):
    """An argparse type: an int or a float from low to high."""
    def number(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
        return kind(text)
    return number

def stage_parser(doc, on_cpu=None, on_gpu=None):
    """An argument parser with the options that stages share.

    on_cpu, on_gpu: prompts in one pass, more on a GPU, which small passes leave waiting for the
    CPU; None is for the stages without a model.
    """
    parser = argparse.ArgumentParser(description=doc.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--run", default="runs/demo", help="folder of this run")
    if on_cpu:
        device, size = ("cuda", on_gpu) if torch.cuda.is_available() else ("cpu", on_cpu)
        parser.add_argument("--device", default=device, help="cpu or cuda")
        parser.add_argument("--prompts-per-batch", type=limited(int, 1), default=size,
                            help="prompts in one pass; fewer take less memory")
    return parser

def check_model(state, model):
    """Raises BadInput if the run's adapter was trained on another model."""
    if os.path.realpath(model) != os.path.realpath(state.get("model", model)):
        raise BadInput(f"{state['adapter']} is of --model {state['model']}, not {model}")

def parse_as_before(parser, names, before=read_state):
    """The arguments; the default of `names` is what before(run) says of the run's last round."""
    known = before(parser.parse_known_args()[0].run)
    parser.set_defaults(**{name: known[name] for name in names if name in known})
    return parser.parse_args()

def parse_args():
    parser = stage_parser(__doc__, on_cpu=16, on_gpu=32)
    add = parser.add_argument
    add("--manifest", default="tests/demo/train.jsonl", help="JSON lines: audio, prompt, reference")
    add("--model", default="tests/demo/model", help="folder or hub name of a speech LLM")
    add("--num-prompts", type=limited(int, 1), default=64, help="N, prompts in this round")
    add("--num-responses", type=limited(int, 1), default=8, help="K, responses per prompt")
    add("--max-new-tokens", type=limited(int, 1), default=200, help="longest response")
    add("--temperature", type=limited(float, 0), default=1.0, help="of the sampling")
    add("--top-p", type=limited(float, 0.001, 1), default=0.9, help="nucleus of the sampling")
    add("--system-prompt", default="", help="fixes what a template fills with today's date")
    add("--raw-prompt", action=argparse.BooleanOptionalAction, default=False,
        help="leave the model's chat template out")
    add("--seed", type=limited(int, 0), default=0, help="of the prompts' order and of the sampling")
    return parse_as_before(parser, ["manifest", "model", "system_prompt", "raw_prompt", "seed"])

def main(args):
    # 1. The prompts of this round: the next slice of the shuffled manifest.
    manifest, state = read_manifest(args.manifest), read_state(args.run)
    check_model(state, args.model)
    N, K = min(args.num_prompts, len(manifest)), args.num_responses
    examples = [manifest[n] for n in next_slice(len(manifest), state["seen"], N, args.seed)]

    # 2. Listen, once per prompt.
    model, processor = load_model(args.model, state["adapter"], args.device)
    print("The model is asked:", render_prompt(processor, examples[0]["prompt"], args.system_prompt,
                                               args.raw_prompt).strip(), sep="\n")
    embeds, heard = [], embed_examples(model, processor, examples, args.system_prompt,
                                       args.raw_prompt)
    while group := list(islice(heard, args.prompts_per_batch)):
        embeds += to_disk(group, args.run)

    # 3. Answer, K times per prompt.
    torch.manual_seed(1000 * args.seed + state["round"])
    began = time.time()
    sampled = sample_all(model, embeds, args.prompts_per_batch,
                         K, args.max_new_tokens, args.temperature, args.top_p)
    speed = sum(lengths.sum().item() for _, lengths in sampled) / (time.time() - began)

    # 4. Write.
    prompts = []
    for example, embed, (responses, lengths) in zip(examples, embeds, sampled):
        texts, ends = spell(processor.tokenizer, responses, lengths)
        prompts.append({**example, "embeds": embed, "responses": responses, "lengths": lengths,
                        "texts": texts, "ends": ends})
    meta = {name: value for name, value in vars(args).items() if name not in ("run", "device")}
    meta |= {"round": state["round"] + 1, "seen": state["seen"] + N, "num_prompts": N,
             "policy": state.get("trained_on")}
    content = repr([meta, examples, [prompt["responses"].tolist() for prompt in prompts]])
    meta["id"] = hashlib.sha256(content.encode()).hexdigest()[:12]
    save_stage(args.run, "rollouts", meta, prompts)

    # 5. Show.
    print(f"\nRound {meta['round']}: {N} prompts, {K} responses each, {speed:.0f} tokens/s -> "
          f"{args.run}/rollouts.pt\n  {prompts[0]['prompt']}\n  wanted   {prompts[0]['reference']}")
    for text in prompts[0]["texts"]:
        print(f"  sampled  {text}")

if __name__ == "__main__":
    run_stage(main, parse_args)
