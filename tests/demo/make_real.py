"""Make a small real speech LLM of pretrained parts: Whisper-base hears, SmolLM2-135M answers.

Whisper-base's encoder (20 M parameters), a linear projector, and SmolLM2-135M-Instruct become a
model of the class of Qwen2-Audio: 183 M parameters, since its output head is a copy of the 28 M of
its embeddings. Only the projector and a small LoRA are trained, on announcements strung together as
in make_demo.py, with no test sentence among them.

1. Listen, without the language model. The projector learns to turn what the encoder hears into the
   embeddings of the words said. CTC finds out which of them is said when. After 20 epochs over 2000
   announcements, 1% of the words in the test clips are wrong.
2. Answer. Projector and LoRA learn to answer like a generalist: each part of an answer comes in one
   of several phrasings, drawn evenly, of which the reference is one. In 240 steps of 4 clips the
   loss falls from 3 to 0.2 nats.

Reads   the two parts: folders, or names on a hub; real/: what was trained
Writes  a folder that from_pretrained loads, the LoRA folded in
        with --train, real/ as well: the trained weights, and manifests over the clips of the demo
        (train_questions.jsonl and test_questions.jsonl ask the demo's questions)

Run     python tests/demo/make_real.py                                  a minute
        python tests/demo/make_real.py --train --sounds DIR_WITH_DEBS   2 cores: 45 minutes
        Stopped, it goes on: after the last 100 encoded clips, at the first epoch of
        listening, or after the last 20 steps of answering. With other options, delete --scratch.
"""
import argparse
import json
import math
import os
import random
import re
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import (AutoModelForCausalLM, AutoTokenizer, GenerationConfig, Qwen2AudioConfig,
                          Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor,
                          WhisperFeatureExtractor, WhisperModel)

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent)]
import make_demo
sampling = import_module("01_sample")

PROMPT = "Write down what you hear, say what it is about, and then what the caller has to do."
# What is heard, what it is about, and what the caller has to do.
ANNOUNCEMENTS = (
    ("you have (.*)", "the mailbox", "listen to {}"),
    ("message received (.*)", "a message", "listen to the message received {}"),
    ("you are currently caller number (.*) (?:waiting|thank) .*", "the queue",
     "wait until it is the turn of caller number {}"),
    ("currently there are more than (.*) callers waiting .*", "the queue",
     "wait behind more than {} other callers"),
    ("the estimated hold time is currently (.*)", "the hold time", "hold the line for {}"),
    ("there are currently (.*) other participants in the conference.*", "a conference",
     "greet the {} other participants"),
    ("the person at extension (.*) is on the phone", "a busy line",
     "call extension {} again later"),
    ("the person at extension (.*) is unavailable", "a missed call",
     "leave a message for extension {}"),
    ("the person at extension (.*) is now in the conference", "a conference",
     "say hello to extension {}"),
    ("the person at extension (.*) has left the conference", "a conference",
     "call extension {} to go on talking"),
    ("at the sound of the tone the time will be exactly (.*)", "the time of day",
     "set the clock to {}"),
    ("this message lasts (.*)", "a message", "take {} to listen to the message"),
    ("message from phone number (.*)", "a missed call", "call back the phone number {}"),
    ("message from extension (.*)", "a missed call", "call back the extension {}"),
    ("incoming call from (.*)", "a new call", "answer the call from {}"))
# The phrasings of the three parts of an answer; the first of each is the reference's.
HEARD = ("The announcement says: {}.", 'I hear "{}" on the phone.',
         "A voice on the line reads this out: {}.")
ABOUT = ("It is about {}.", "So {} is the subject here.", "This one concerns {} above all.")
TO_DO = ("The caller has to {}.", "Now it is time to {} without delay.",
         "Please {}, and that is all.")
DIGITS = {make_demo.english(n).replace("-", " "): str(n) for n in range(100)}
NUMBER = re.compile(rf"\b({'|'.join(sorted(DIGITS, key=len, reverse=True))})\b")  # longest first


# The task with several decisions in an answer.

def in_digits(text):
    """
    >>> in_digits("twenty five new and twelve old messages"), in_digits("three oh nine")
    ('25 new and 12 old messages', '3 oh 9')
    """
    return NUMBER.sub(lambda match: DIGITS[match[0]], text)


def write_answer(sentence, rng=None):
    """The reference for what is said; with rng, one of 108 phrasings, the reference among them.

    >>> write_answer("incoming call from two five")
    'The announcement says: incoming call from two five. It is about a new call. The caller has to \
answer the call from two five.'
    """
    matches = [(re.fullmatch(pattern, sentence), about, to_do)
               for pattern, about, to_do in ANNOUNCEMENTS]
    match, about, to_do = next(found for found in matches if found[0])
    parts = []
    for phrasings, text in ((HEARD, sentence), (ABOUT, about), (TO_DO, to_do.format(match[1]))):
        phrasing = phrasings[0]
        if rng:
            phrasing = rng.choice(phrasings)
            text = rng.choice((text, in_digits(text)))
        parts.append(phrasing.format(text))
    return " ".join(parts)


def draw_task(clip, rng):
    """(prompt, answer): more often the task of several decisions than a question of the demo."""
    if rng.random() < 0.6:
        return PROMPT, write_answer(clip["sentence"], rng)
    question = rng.choice(list(clip["questions"]))
    return question, rng.choice(clip["questions"][question])


# The parts.

def assemble(encoder, language_model, seconds=make_demo.MAX_SECONDS):
    """The parts (folders or hub names) as one model, float32, and its processor. The projector is
    random. The encoder hears `seconds` at most, instead of 30: it pads each clip to its limit."""
    whisper = WhisperModel.from_pretrained(encoder, dtype=torch.float32).encoder
    lm = AutoModelForCausalLM.from_pretrained(language_model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(language_model)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"]})
    old_size = len(lm.get_input_embeddings().weight)
    lm.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    for table in (lm.get_input_embeddings().weight.data, lm.get_output_embeddings().weight.data):
        table[old_size:] = table[:old_size].mean(dim=0)

    positions = 50 * seconds
    audio_config = {name: getattr(whisper.config, name) for name in (
        "num_mel_bins", "d_model", "encoder_layers", "encoder_attention_heads", "encoder_ffn_dim")}
    audio_config |= {"model_type": "qwen2_audio_encoder", "max_source_positions": positions}
    model = Qwen2AudioForConditionalGeneration(Qwen2AudioConfig(
        audio_config=audio_config, text_config=lm.config.to_dict(),
        audio_token_index=tokenizer.convert_tokens_to_ids("<|AUDIO|>")))
    weights = whisper.state_dict()
    weights["embed_positions.weight"] = weights["embed_positions.weight"][:positions]
    model.model.audio_tower.load_state_dict(weights)
    model.model.language_model.load_state_dict(lm.get_decoder().state_dict())
    model.lm_head.load_state_dict(lm.get_output_embeddings().state_dict())
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id,
                                               pad_token_id=tokenizer.pad_token_id)
    features = WhisperFeatureExtractor(feature_size=whisper.config.num_mel_bins,
                                       chunk_length=seconds)
    processor = Qwen2AudioProcessor(features, tokenizer, chat_template=make_demo.CHAT_TEMPLATE)
    return model.eval().requires_grad_(False), processor


def add_lora(model, rank):
    """LoRA on each linear layer of the language model; the projector is trained as a whole."""
    return get_peft_model(model, LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=r".*\.language_model\..*_proj",
        modules_to_save=["multi_modal_projector"]))


@torch.no_grad()
def encode_clips(model, processor, clips, batch_size=8):
    """Replaces the samples of each clip by `states` (F_i, d_model) float16: what the encoder hears,
    25 frames a second. That is what the projector takes, so the model itself is stopped there."""
    def stop(module, args):
        raise sampling.StopForward(args[0].half().cpu())
    hook = model.model.multi_modal_projector.register_forward_pre_hook(stop)
    for batch in sampling.chunks(clips, batch_size):
        waves = [clip.pop("samples").numpy() for clip in batch]
        inputs = processor(text=["<|AUDIO|>"] * len(batch), padding=True, return_tensors="pt",
                           audio=waves, sampling_rate=make_demo.RATE)
        frames = inputs["attention_mask"].sum(dim=1)  # the text is placeholders, one a frame
        try:
            model(**inputs.to(model.device))
        except sampling.StopForward as stopped:
            for clip, states, count in zip(batch, stopped.args[0], frames):
                clip["states"] = states[:count].clone()
    hook.remove()


def draw_clips(model, processor, telephone, forbidden, count, seed, path):
    """`count` clips of announcements that are not forbidden. Those in the file are not redone."""
    clips = torch.load(path) if path.exists() else []
    for start in tqdm(range(len(clips), count, 100), desc="encoding 100 clips", unit="times"):
        rng = random.Random(f"{seed} {start}")
        kinds = rng.choices(list(make_demo.KINDS), k=100)
        drawn = [make_demo.draw_example(rng, telephone, kind, forbidden) for kind in kinds]
        encode_clips(model, processor, drawn)
        clips += drawn
        sampling.save_file(path, clips)
    return clips[:count]


# 1. Listen.

class Listener(torch.nn.Module):
    """Frames of the encoder (F, d_model) -> logits (F, V): the closer a frame, projected, is to the
    embedding of a token in `table` (V, H), the higher is the token's logit."""

    def __init__(self, frames, table):
        super().__init__()
        self.mean = frames.mean(dim=0)
        self.std = frames.std(dim=0)
        self.table = table
        self.mean_square_distance = torch.pdist(table).square().mean()
        self.linear = torch.nn.Linear(frames.shape[1], table.shape[1])
        torch.nn.init.zeros_(self.linear.weight)
        self.linear.bias.data = table.mean(dim=0)
        self.log_sharpness = torch.nn.Parameter(torch.tensor(0.0))  # a higher one does not learn

    def project(self, states):
        return self.linear((states.float() - self.mean) / self.std)

    def forward(self, states):
        distance = torch.cdist(self.project(states), self.table)
        return -self.log_sharpness.exp() * distance ** 2 / self.mean_square_distance

    def write_into(self, projector, frames):
        """Writes the projection into a Linear layer that takes frames as they are. What it makes of
        `frames` gets the mean norm of an embedding, which the language model is used to."""
        scale = self.table.norm(dim=1).mean() / self.project(frames).norm(dim=1).mean()
        weight = self.linear.weight.data
        projector.weight.data = scale * weight / self.std
        projector.bias.data = scale * (self.linear.bias.data - weight @ (self.mean / self.std))


def learn_words(model, tokenizer, clips, test, epochs, learning_rate=2e-3, batch_size=16):
    """Train the projector on `clips` so that what it makes of a frame is closest to the embedding
    of the token said, or of a newline, CTC's blank. Prints the errors on the clips of `test`."""
    targets = [tokenizer(" " + clip["sentence"]).input_ids for clip in clips]
    blank = tokenizer("\n").input_ids[0]
    tokens = [blank] + sorted({token for target in targets for token in target})
    number = {token: i for i, token in enumerate(tokens)}
    targets = [torch.tensor([number[token] for token in target]) for target in targets]
    frames = torch.cat([clip["states"] for clip in clips]).float()
    listener = Listener(frames, model.get_input_embeddings().weight[tokens])
    optimizer = torch.optim.AdamW(listener.parameters(), lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, epochs * math.ceil(len(clips) / batch_size), pct_start=0.1)
    for epoch in range(epochs):
        order = torch.randperm(len(clips)).tolist()
        for batch in sampling.chunks(order, batch_size):
            states = pad_sequence([clips[n]["states"] for n in batch], batch_first=True)
            loss = F.ctc_loss(listener(states).log_softmax(dim=-1).transpose(0, 1),
                              torch.cat([targets[n] for n in batch]),
                              torch.tensor([len(clips[n]["states"]) for n in batch]),
                              torch.tensor([len(targets[n]) for n in batch]), zero_infinity=True)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if (epoch + 1) % 4 == 0:
            wrong = 100 * word_errors(listener, tokenizer, tokens, test)
            print(f"listening, epoch {epoch + 1}: loss {loss.item():.3f}, {wrong:.1f}% of the test "
                  "clips' words wrong", flush=True)
    with torch.no_grad():
        listener.write_into(model.model.multi_modal_projector.linear, frames[::100])


@torch.no_grad()
def word_errors(listener, tokenizer, tokens, clips):
    """The share of words wrong in clips. `tokens`: the token of each logit, the first is blank."""
    errors = 0
    total = 0
    for clip in clips:
        path = listener(clip["states"]).argmax(dim=-1).tolist()
        said = [i for i, before in zip(path, [0] + path) if i not in (0, before)]
        words = tokenizer.decode([tokens[i] for i in said]).split()
        reference = clip["sentence"].split()
        errors += edits(words, reference)
        total += len(reference)
    return errors / total


def edits(words, reference):
    """The least number of words to insert, delete or replace.

    >>> edits("you have new messages".split(), "you have two old messages".split())
    2
    """
    row = list(range(len(reference) + 1))
    for i, word in enumerate(words, start=1):
        before = row
        row = [i]
        for j, other in enumerate(reference, start=1):
            row.append(min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (word != other)))
    return row[-1]


# 2. Answer.

def answer_loss(model, processor, clips, rng):
    """Cross-entropy of the tokens of an answer about each clip, its end included."""
    embed = model.get_input_embeddings()
    rows = []
    answers = []
    for clip in clips:
        prompt, answer = draw_task(clip, rng)
        text = sampling.render_prompt(processor, prompt) + answer + processor.tokenizer.eos_token
        ids = [torch.tensor(processor.tokenizer(part).input_ids, device=model.device)
               for part in text.split(processor.audio_token)]
        speech = model.model.multi_modal_projector(clip["states"].float().to(model.device))
        rows.append(torch.cat([embed(ids[0]), speech, embed(ids[1])]))
        size = len(processor.tokenizer(answer + processor.tokenizer.eos_token).input_ids)
        answers.append(ids[1][-size:])
    mask = [torch.ones(len(row), dtype=torch.int64, device=model.device) for row in rows]
    hidden = model.get_decoder()(inputs_embeds=pad_sequence(rows, batch_first=True),
                                 attention_mask=pad_sequence(mask, batch_first=True))
    hidden = [states[len(row) - len(answer) - 1:len(row) - 1]  # each predicts the next token
              for states, row, answer in zip(hidden.last_hidden_state, rows, answers)]
    return F.cross_entropy(model.lm_head(torch.cat(hidden)).float(), torch.cat(answers))


def learn_answers(model, processor, clips, args, path):
    """Train the projector and a LoRA on `clips`; return the PEFT model. What is in the file is not
    redone: the weights, the optimizer and the number of steps, every 20 steps."""
    model = add_lora(model, args.lora_rank)
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    groups = [{"params": [weight for name, weight in trained.items() if "lora_" in name]},
              {"params": [weight for name, weight in trained.items() if "lora_" not in name],
               "lr": args.learning_rate / 10}]
    optimizer = torch.optim.AdamW(groups, args.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(
        (step + 1) / 20, 0.02 + 0.98 * (1 + math.cos(math.pi * step / args.steps)) / 2))
    start = 0
    if path.exists():
        saved = torch.load(path)
        model.load_state_dict(saved["weights"], strict=False)
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        start = saved["steps"]
    clips = sorted(clips, key=lambda clip: len(clip["states"]))  # a batch has clips of like length
    losses = []
    began = time.time()
    for step in range(start, args.steps):
        rng = random.Random(f"{args.seed} {step}")
        first = rng.randrange(len(clips) - args.batch_size + 1)
        loss = answer_loss(model.base_model.model, processor,
                           clips[first:first + args.batch_size], rng)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if (step + 1) % 20 == 0 or step + 1 == args.steps:
            print(f"answering, step {step + 1}: loss {sum(losses) / len(losses):.3f}, "
                  f"{(time.time() - began) / len(losses):.1f} s a step", flush=True)
            losses = []
            began = time.time()
            weights = {name: weight.detach() for name, weight in trained.items()}
            sampling.save_file(path, {"weights": weights, "optimizer": optimizer.state_dict(),
                                      "schedule": schedule.state_dict(), "steps": step + 1})
    return model


def save_trained(model, folder):
    """Projector and LoRA as a PEFT adapter, float16."""
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.half()
    model.save_pretrained(folder)
    os.remove(folder / "README.md")  # PEFT's form for a description, empty


def fold(model, folder):
    """The model with the projector and the LoRA of the folder merged into its weights."""
    return PeftModel.from_pretrained(model, str(folder)).merge_and_unload()


# All of it.

def write_manifests(out, split, examples, seed):
    """Two manifests over the demo's clips: of several decisions, and of the demo's questions."""
    rng = random.Random(seed)
    decisions = [(PROMPT, write_answer(example["sentence"])) for example in examples]
    questions = []
    for example in examples:
        prompt = rng.choice(list(example["questions"]))
        questions.append((prompt, example["questions"][prompt][0]))
    clips = os.path.relpath(HERE / split, out)
    for name, tasks in ((split, decisions), (f"{split}_questions", questions)):
        lines = []
        for i, (prompt, reference) in enumerate(tasks):
            lines.append(json.dumps({"id": f"{split}-{i:03}", "audio": f"{clips}/{i:03}.ogg",
                                     "prompt": prompt, "reference": reference}) + "\n")
        sampling.save_file(out / f"{name}.jsonl", "".join(lines))


def train(model, processor, args):
    """Both phases, on announcements that no test clip says; writes args.trained."""
    torch.manual_seed(args.seed)
    args.scratch.mkdir(parents=True, exist_ok=True)
    folder = tempfile.TemporaryDirectory()
    telephone = make_demo.Telephone(args.sounds, folder.name)
    rng = random.Random(0)  # as in make_demo.py: the same clips
    test = make_demo.draw_split(rng, telephone, 128, frozenset())
    forbidden = {example["sentence"] for example in test}
    train_split = make_demo.draw_split(rng, telephone, 256, forbidden)
    clips = draw_clips(model, processor, telephone, forbidden, args.clips, args.seed,
                       args.scratch / "clips.pt")
    projector = args.scratch / "projector.pt"
    if not projector.exists():
        encode_clips(model, processor, test)
        learn_words(model, processor.tokenizer, clips, test, args.epochs)
        sampling.save_file(projector, model.model.multi_modal_projector.state_dict())
    model.model.multi_modal_projector.load_state_dict(torch.load(projector))
    model = learn_answers(model, processor, clips, args, args.scratch / "answers.pt")
    save_trained(model, args.trained)
    write_manifests(args.trained, "test", test, args.seed)
    write_manifests(args.trained, "train", train_split, args.seed + 1)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--encoder", default="openai/whisper-base", help="Whisper: a folder, or a name on a hub")
    add("--language-model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="likewise")
    add("--out", type=Path, default="runs/real-model", help="folder of the model")
    add("--trained", type=Path, default=HERE / "real", help="folder of what was trained")
    add("--train", action="store_true", help="train the projector and the LoRA anew")
    add("--sounds", help="folder with the two Debian packages that make_demo.py names")
    add("--scratch", type=Path, default="runs/make_real", help="what is finished of a training")
    add("--seed", type=int, default=0, help="of the training; the demo's clips stay the same")
    add("--clips", type=int, default=2000, help="announcements to train on")
    add("--epochs", type=int, default=20, help="of listening")
    add("--steps", type=int, default=240, help="of answering")
    add("--batch-size", type=int, default=4, help="clips a step of answering")
    add("--learning-rate", type=float, default=1e-3, help="of the LoRA; the projector's is a tenth")
    add("--lora-rank", type=int, default=6)
    args = parser.parse_args()
    if args.train and not args.sounds:
        parser.error("--train needs --sounds")
    return args


def main():
    args = parse_args()
    try:
        model, processor = assemble(args.encoder, args.language_model)
    except OSError as error:  # no network, no such name, no such folder
        reason = str(error).splitlines()[0].rstrip(".")
        sys.exit(f"{args.encoder} or {args.language_model} cannot be loaded ({reason}): connect to "
                 "the hub once, or give their folders by --encoder and --language-model")
    if args.train:
        train(model, processor, args)
        model, processor = assemble(args.encoder, args.language_model)
    model = fold(model, args.trained)
    model.half().save_pretrained(args.out)
    processor.save_pretrained(args.out)
    print(f"{args.out}: {model.num_parameters() / 1e6:.0f} million parameters")


if __name__ == "__main__":
    main()
