"""Make the embedded demo: recorded speech and a small speech LLM that has listened to it.

The announcements of a telephone system are made to be strung together: "you have" "twenty" "five"
"new" "messages". Ten kinds of them become clips of about five seconds, each with a question about
it or the request to translate it. The model is of the class of Qwen2-Audio, 3,500 times smaller;
it meets sentences strung together on the fly, never one of the test sentences.

1. From scratch, answers in the wording of the references. An auxiliary CTC loss (letters of the
   English words, on what the encoder hands over) makes it listen; its head is thrown away.
2. Like a generalist: each answer comes in one of three phrasings, of which the reference is one,
   drawn evenly. So the model ends up right, but not in the wanted words, which is the state in
   which a real speech LLM meets its task.

Reads:  two Debian packages: apt-get download asterisk-core-sounds-en-g722 asterisk-core-sounds-en
Writes: train.jsonl, test.jsonl (id, audio, prompt, reference), train/*.ogg, test/*.ogg, model/

Run:    python tests/demo/make_demo.py --sounds DIR_WITH_DEBS      (needs ffmpeg; an hour on 2 cores)

The same seed gives the same clips and prompts, and the same weights as far as the CPU rounds
alike. With --scratch DIR the weights of each phase are kept, and a phase kept is not redone:
remove its file after a change to the announcements, which decide what the tokens mean.
"""

import argparse
import calendar
import gzip
import json
import math
import random
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import soundfile
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from tqdm import tqdm
from transformers import (GenerationConfig, PreTrainedTokenizerFast, Qwen2AudioConfig,
                          Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor,
                          WhisperFeatureExtractor)

RATE = 16000                 # Hz
MAX_SECONDS = 8              # 800 mel frames, 400 encoder positions, 200 audio embeddings
TRANSLATE = "Translate the audio to German."
LETTERS = " abcdefghijklmnopqrstuvwxyz'"          # CTC classes 1.., 0 is the blank
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>",
           "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"]

# Qwen2-Audio's, without "Audio 1:" and without a system message that nobody asked for.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for item in message['content'] %}"
    "{% if item['type'] == 'audio' %}<|audio_bos|><|AUDIO|><|audio_eos|>\n"
    "{% elif item['type'] == 'text' %}{{ item['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


# Numbers, dates and times: as recordings, in English, in German.

EN_UNITS = ("zero one two three four five six seven eight nine ten eleven twelve thirteen "
            "fourteen fifteen sixteen seventeen eighteen nineteen").split()
EN_TENS = "- - twenty thirty forty fifty sixty seventy eighty ninety".split()
EN_ORDINALS = ("- first second third fourth fifth sixth seventh eighth ninth tenth eleventh "
               "twelfth thirteenth fourteenth fifteenth sixteenth seventeenth eighteenth "
               "nineteenth").split()
DE_UNITS = ("null eins zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn "
            "vierzehn fünfzehn sechzehn siebzehn achtzehn neunzehn").split()
DE_TENS = "- - zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig".split()
DE_ORDINALS = ("- ersten zweiten dritten vierten fünften sechsten siebten achten neunten zehnten "
               "elften zwölften").split()
EN_DAYS = "Sunday Monday Tuesday Wednesday Thursday Friday Saturday".split()
DE_DAYS = "Sonntag Montag Dienstag Mittwoch Donnerstag Freitag Samstag".split()
EN_MONTHS = ("January February March April May June July August September October November "
             "December").split()
DE_MONTHS = ("Januar Februar März April Mai Juni Juli August September Oktober November "
             "Dezember").split()


def say_number(n, prefix="digits/"):
    """The recordings of a number; of an ordinal with the prefix "digits/h-".

    >>> say_number(25), say_number(23, "digits/h-")
    (['digits/20', 'digits/5'], ['digits/20', 'digits/h-3'])
    """
    if n <= 20 or n % 10 == 0:
        return [f"{prefix}{n}"]
    return [f"digits/{n - n % 10}", f"{prefix}{n % 10}"]


def english(n):
    """
    >>> english(7), english(25)
    ('seven', 'twenty-five')
    """
    if n < 20:
        return EN_UNITS[n]
    return EN_TENS[n // 10] + (f"-{EN_UNITS[n % 10]}" if n % 10 else "")


def english_ordinal(n):
    """
    >>> english_ordinal(12), english_ordinal(20), english_ordinal(31)
    ('twelfth', 'twentieth', 'thirty-first')
    """
    if n < 20:
        return EN_ORDINALS[n]
    tens = EN_TENS[n // 10]
    return f"{tens}-{EN_ORDINALS[n % 10]}" if n % 10 else f"{tens[:-1]}ieth"


def german(n):
    """
    >>> german(1), german(21), german(37)
    ('eins', 'einundzwanzig', 'siebenunddreißig')
    """
    if n < 20:
        return DE_UNITS[n]
    unit = "ein" if n % 10 == 1 else DE_UNITS[n % 10]
    return (f"{unit}und" if n % 10 else "") + DE_TENS[n // 10]


def german_ordinal(n):
    """
    >>> german_ordinal(3), german_ordinal(17), german_ordinal(31)
    ('dritten', 'siebzehnten', 'einunddreißigsten')
    """
    if n <= 12:
        return DE_ORDINALS[n]
    return german(n) + ("ten" if n < 20 else "sten")


def draw_digits(rng, low, high):
    """A number read digit by digit: recordings, English, German."""
    digits = [rng.randrange(10) for _ in range(rng.randint(low, high))]
    return ([f"digits/{d}" for d in digits], " ".join(EN_UNITS[d] for d in digits),
            " ".join(DE_UNITS[d] for d in digits))


def draw_time(rng):
    """A time of day: recordings, English, German, and "a.m." or "p.m."."""
    hour, minute, half = rng.randint(1, 12), rng.randrange(60), rng.choice(("a.m.", "p.m."))
    if rng.random() < 0.15:
        minute = 0
    said = say_number(hour)
    text = english(hour)
    if minute == 0:
        said, text = said + ["digits/oclock"], f"{text} o'clock"
    elif minute < 10:
        said, text = said + ["digits/oh"] + say_number(minute), f"{text} oh {english(minute)}"
    else:
        said, text = said + say_number(minute), f"{text} {english(minute)}"
    said.append("digits/a-m" if half == "a.m." else "digits/p-m")
    hour_of_day = hour % 12 + (12 if half == "p.m." else 0)
    deutsch = ("ein" if hour_of_day == 1 else german(hour_of_day)) + " Uhr"
    return said, f"{text} {half}", deutsch + (f" {german(minute)}" if minute else ""), half


def draw_duration(rng):
    """Minutes, often with seconds: recordings, English, German, German in the dative."""
    minutes = rng.randint(1, 59)
    said = say_number(minutes) + ["minute" if minutes == 1 else "vm-minutes"]
    text = "one minute" if minutes == 1 else f"{english(minutes)} minutes"
    deutsch = "eine Minute" if minutes == 1 else f"{german(minutes)} Minuten"
    if rng.random() < 0.5:
        seconds = rng.randint(2, 59)
        said += say_number(seconds) + ["seconds"]
        text += f" and {english(seconds)} seconds"
        deutsch += f" und {german(seconds)} Sekunden"
    return said, text, deutsch, deutsch.replace("eine Minute", "einer Minute")


# The ten kinds of announcement. Each returns (recordings, translations, {question: answers}).
# Translations and answers come in three phrasings that part in their first words; the first is
# the reference. The docstring is what one hears.

def announce_messages(rng):
    """you have / five / new / and / twelve / old / messages"""
    counts = {word: rng.randint(1, 99) for word in rng.choice((["new"], ["old"], ["new", "old"]))}
    files = {"new": "vm-INBOX", "old": "vm-Old"}
    said, german_counts, questions = ["vm-youhave"], [], {}
    for word, count in counts.items():
        said += (["vm-and"] if german_counts else []) + say_number(count) + [files[word]]
        adjective = {"new": "neue", "old": "alte"}[word]
        german_counts.append(f"{'eine' if count == 1 else german(count)} {adjective}")
        things = f"{english(count)} {word} message{'s' if count > 1 else ''}"
        questions[f"How many {word} messages are there?"] = (
            f"There {'are' if count > 1 else 'is'} {things}.",
            f"You have {things}.",
            f"The mailbox holds {things}.")
    said.append("vm-message" if count == 1 else "vm-messages")
    things = " und ".join(german_counts) + (" Nachricht" if count == 1 else " Nachrichten")
    one = list(counts.values()) == [1]
    return said, (
        f"Sie haben {things}.",
        f"Für Sie {'liegt' if one else 'liegen'} {things} vor.",
        f"In Ihrem Postfach {'befindet' if one else 'befinden'} sich {things}."), questions


def announce_received(rng):
    """message / received / Monday / March / third / at / four / fifteen / p.m."""
    time_said, time_text, uhrzeit, _ = draw_time(rng)
    if rng.random() < 0.2:
        day_text, tag = rng.choice((("today", "heute"), ("yesterday", "gestern")))
        day_said, on, am = [f"digits/{day_text}"], day_text, tag
        vom = f"von {tag},"
    else:
        weekday, month = rng.randrange(7), rng.randrange(12)
        day = rng.randint(1, calendar.monthrange(2024, month + 1)[1])
        day_said = [f"digits/day-{weekday}", f"digits/mon-{month}"] + say_number(day, "digits/h-")
        day_text = f"{EN_DAYS[weekday]}, {EN_MONTHS[month]} {english_ordinal(day)}"
        tag = f"{DE_DAYS[weekday]}, dem {german_ordinal(day)} {DE_MONTHS[month]},"
        on, am, vom = f"on {day_text}", f"am {tag}", f"vom {tag}"
    said = ["vm-message", "vm-received"] + day_said + ["digits/at"] + time_said
    return said, (f"Die Nachricht ging {am} um {uhrzeit} ein.",
                  f"Um {uhrzeit} {am} wurde die Nachricht empfangen.",
                  f"Diese Nachricht stammt {vom} {uhrzeit}."), {
        "On which day was the message received?": (
            f"The message was received {on}.",
            f"It came in {on}.",
            f"Its day of receipt is {day_text}."),
        "At what time was the message received?": (
            f"The message was received at {time_text}",
            f"It came in at {time_text}",
            f"Its time of receipt is {time_text}")}


def announce_queue(rng):
    """You are currently caller number / five / waiting to speak with a representative"""
    n = rng.randint(1, 99)
    said = ["queue-thereare"] + say_number(n)
    questions = {"Which number is the caller?": (
        f"The caller is number {english(n)}.",
        f"You are caller number {english(n)}.",
        f"Their number in the queue is {english(n)}.")}
    if rng.random() < 0.5:
        return said + ["queue-thankyou"], (
            f"Sie sind derzeit Anrufer Nummer {german(n)}. Vielen Dank für Ihre Geduld.",
            f"Derzeit sind Sie der Anrufer mit Nummer {german(n)}. Danke für Ihre Geduld.",
            f"Ihre Nummer als Anrufer ist {german(n)}. Wir danken für Ihre Geduld."), questions
    questions["What is the caller waiting for?"] = (
        "The caller is waiting to speak with a representative.",
        "They are waiting for a representative.",
        "To speak with a representative is what they are waiting for.")
    return said + ["queue-callswaiting"], (
        f"Sie sind derzeit Anrufer Nummer {german(n)} und warten auf ein Gespräch mit einem "
        "Mitarbeiter.",
        f"Derzeit warten Sie als Anrufer Nummer {german(n)} darauf, einen Mitarbeiter zu sprechen.",
        f"Als Anrufer Nummer {german(n)} warten Sie auf einen freien Mitarbeiter."), questions


def announce_waiting(rng):
    """Currently there are more than / twenty / callers waiting to speak with a representative"""
    n = rng.randint(2, 99)
    return ["queue-quantity1"] + say_number(n) + ["queue-quantity2"], (
        f"Derzeit warten mehr als {german(n)} Anrufer auf ein Gespräch mit einem Mitarbeiter.",
        f"Mehr als {german(n)} Anrufer warten derzeit darauf, einen Mitarbeiter zu sprechen.",
        f"Es warten derzeit mehr als {german(n)} Anrufer auf einen freien Mitarbeiter."), {
        "How many callers are waiting?": (
            f"More than {english(n)} callers are waiting.",
            f"There are more than {english(n)} callers waiting.",
            f"The queue has more than {english(n)} callers."),
        "Who do the callers want to speak with?": (
            "The callers want to speak with a representative.",
            "They are waiting for a representative.",
            "It is a representative they want to speak with.")}


def announce_holdtime(rng):
    """The estimated hold time is currently / less than / five / minutes"""
    said, text, dauer, dauer_dative = draw_duration(rng)
    if rng.random() < 0.3:
        said, text = ["queue-less-than"] + said, f"less than {text}"
        dauer, dauer_dative = f"weniger als {dauer}", f"weniger als {dauer_dative}"
    return ["queue-holdtime"] + said, (
        f"Die geschätzte Wartezeit beträgt derzeit {dauer}.",
        f"Derzeit ist mit einer Wartezeit von {dauer_dative} zu rechnen.",
        f"Sie müssen derzeit voraussichtlich {dauer} warten."), {
        "How long is the estimated hold time?": (
            f"The estimated hold time is {text}.",
            f"It is estimated at {text}.",
            f"You can expect to wait {text}."),
        "How long does the caller have to wait?": (
            f"The caller has to wait {text}.",
            f"It will take {text}.",
            f"A wait of {text} is expected.")}


def announce_conference(rng):
    """There are currently / five / other participants in the conference"""
    n = rng.randint(2, 99)
    said = ["conf-thereare"] + say_number(n) + ["conf-otherinparty"]
    translations = (f"Es gibt derzeit {german(n)} weitere Teilnehmer in der Konferenz.",
                    f"Derzeit nehmen {german(n)} weitere Personen an der Konferenz teil.",
                    f"In der Konferenz sind derzeit {german(n)} weitere Teilnehmer.")
    questions = {"How many other participants are there?": (
        f"There are {english(n)} other participants.",
        f"The conference has {english(n)} other participants.",
        f"Besides you there are {english(n)} participants.")}
    if rng.random() < 0.5:
        file, state, zustand = rng.choice((
            ("conf-now-recording", "being recorded", "wird jetzt aufgezeichnet"),
            ("conf-lockednow", "locked", "ist jetzt gesperrt"),
            ("conf-now-muted", "muted", "ist jetzt stummgeschaltet")))
        said.append(file)
        translations = tuple(f"{text} Die Konferenz {zustand}." for text in translations)
        questions["What is the state of the conference?"] = (
            f"The conference is now {state}.",
            f"It is now {state}.",
            f"From now on the conference is {state}.")
    return said, translations, questions


def announce_person(rng):
    """The person at extension / four / one / two / is on the phone"""
    said, text, nummer = draw_digits(rng, 3, 4)
    file, state, adverb, verb, rest = rng.choice((
        ("vm-isonphone", "is on the phone", "Gerade", "telefoniert", ""),
        ("vm-isunavail", "is unavailable", "Zurzeit", "ist", "nicht erreichbar"),
        ("conf-hasjoin", "is now in the conference", "Jetzt", "ist", "in der Konferenz"),
        ("conf-hasleft", "has left the conference", "Nun", "hat", "die Konferenz verlassen")))
    rest = f" {rest}" if rest else ""
    middle = f" {adverb.lower()}{rest}"
    they = state.replace("is ", "are ", 1).replace("has ", "have ", 1)
    return ["vm-theperson"] + said + [file], (
        f"Die Person an der Nebenstelle {nummer} {verb}{middle}.",
        f"{adverb} {verb} die Person mit der Durchwahl {nummer}{rest}.",
        f"An Apparat {nummer} {verb} die Person{middle}."), {
        "What is the person's extension?": (
            f"The person's extension is {text}.",
            f"It is extension {text}.",
            f"They can be reached at {text}."),
        "What is said about the person?": (
            f"The person {state}.",
            f"They {they}.",
            f"It is said that the person {state}.")}


def announce_time(rng):
    """At the sound of the tone the time will be exactly / four / fifteen / p.m."""
    said, text, uhrzeit, half = draw_time(rng)
    return ["at-tone-time-exactly"] + said, (
        f"Beim Signalton ist es genau {uhrzeit}.",
        f"Es wird beim Signalton genau {uhrzeit} sein.",
        f"Die genaue Uhrzeit beim Signalton lautet {uhrzeit}."), {
        "What time will it be at the tone?": (
            f"At the tone it will be {text}",
            f"The time will be {text}",
            f"It will be exactly {text}"),
        "Is the time a.m. or p.m.?": (
            f"The time is {half}",
            f"It will be {half}",
            f"At the tone it is {half}")}


def announce_length(rng):
    """This message lasts / five / minutes / thirty / seconds"""
    said, text, dauer, _ = draw_duration(rng)
    return ["vm-duration"] + said, (
        f"Diese Nachricht dauert {dauer}.",
        f"Die Nachricht ist {dauer} lang.",
        f"Die Länge der Nachricht beträgt {dauer}."), {
        "How long does the message last?": (
            f"The message lasts {text}.",
            f"It is {text} long.",
            f"Its length is {text}."),
        "What is the length of the message?": (
            f"The length of the message is {text}.",
            f"It lasts {text}.",
            f"Altogether the message takes {text}.")}


def announce_number(rng):
    """message from phone number / five / five / one / nine / two"""
    file = rng.choice(("followme/call-from", "vm-from-phonenumber", "vm-from-extension"))
    said, text, nummer = draw_digits(rng, *((3, 4) if file == "vm-from-extension" else (5, 6)))
    if file == "followme/call-from":
        return [file] + said, (
            f"Ein Anruf von der Nummer {nummer} geht ein.",
            f"Die Nummer {nummer} ruft an.",
            f"Sie erhalten einen Anruf von der Nummer {nummer}."), {
            "Which number is calling?": (
                f"The number {text} is calling.",
                f"It is {text} calling.",
                f"A call comes from {text}."),
            "Is it a call or a message?": (
                "It is a call.",
                "Someone is calling.",
                "The announcement is about a call.")}
    place, ort = (("phone number", "Telefonnummer") if file == "vm-from-phonenumber"
                  else ("extension", "Nebenstelle"))
    return [file] + said, (
        f"Die Nachricht kommt von der {ort} {nummer}.",
        f"Von der {ort} {nummer} stammt diese Nachricht.",
        f"Es hat jemand mit der {ort} {nummer} eine Nachricht hinterlassen."), {
        f"Which {place} is the message from?": (
            f"The message is from {place} {text}.",
            f"It was {text} that left the message.",
            f"Its sender has {place} {text}."),
        "Is it a call or a message?": (
            "It is a message.",
            "Someone left a message.",
            "The announcement is about a message.")}


KINDS = {"messages": announce_messages, "received": announce_received, "queue": announce_queue,
         "waiting": announce_waiting, "holdtime": announce_holdtime,
         "conference": announce_conference, "person": announce_person, "time": announce_time,
         "length": announce_length, "number": announce_number}


class Telephone:
    """Says announcements with the recordings of the two packages, each decoded once."""

    def __init__(self, debs, folder):
        for tool in ("ffmpeg", "dpkg-deb"):
            if not shutil.which(tool):
                raise SystemExit(f"{tool} is needed to unpack the recordings: install it")
        packages = sorted(Path(debs).glob("asterisk-core-sounds-en*.deb"))
        if len(packages) != 2:
            raise SystemExit(f"{debs} holds {len(packages)} of the two packages: apt-get download "
                             "asterisk-core-sounds-en-g722 asterisk-core-sounds-en")
        for package in packages:
            subprocess.run(["dpkg-deb", "-x", package, folder], check=True)
        self.sounds = next(Path(folder).glob("usr/share/asterisk/sounds/en_US*"))
        self.decoded = {}                                    # name: (samples,)
        self.words = {}                                      # name: lower case, letters only
        listing = next(Path(folder).glob("usr/share/doc/*/core-sounds-en.txt.gz"))
        for line in gzip.decompress(listing.read_bytes()).decode().splitlines():
            name, _, words = line.partition(":")
            letters = "".join(c for c in words.lower() if c in LETTERS)
            self.words[name] = " ".join(letters.split())

    def sentence(self, said):
        """The English words of an announcement; they tell whether two sentences are the same."""
        return " ".join(self.words[name] for name in said)

    def recording(self, name):
        """(samples,) at 16 kHz, without the silence around it."""
        if name in self.decoded:
            return self.decoded[name]
        raw = subprocess.run(["ffmpeg", "-v", "error", "-f", "g722", "-i",
                              self.sounds / f"{name}.g722", "-f", "f32le", "-ac", "1",
                              "-ar", str(RATE), "-"], check=True, capture_output=True).stdout
        samples = torch.frombuffer(bytearray(raw), dtype=torch.float32)
        frame = RATE // 100                                                     # 10 ms
        power = samples[:len(samples) // frame * frame].view(-1, frame).square().mean(1)
        loud = (power > power.max() * 1e-4).nonzero().flatten()                 # within 40 dB
        self.decoded[name] = samples[max(0, loud[0] - 2) * frame:(loud[-1] + 4) * frame]
        return self.decoded[name]

    def clip(self, said, rng):
        """(samples,) at 16 kHz: gaps, speed, gain and noise drawn from rng."""
        pieces = [torch.zeros(rng.randint(1, 8) * RATE // 50)]
        for name in said:
            pieces += [self.recording(name), torch.zeros(rng.randint(1, 4) * RATE // 50)]
        samples = resample(torch.cat(pieces), rng.uniform(0.92, 1.08))
        samples = samples / samples.abs().max() * 10 ** rng.uniform(-0.8, -0.05)  # peak 0.16-0.89
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        noise = torch.randn(len(samples), generator=generator)
        return samples + noise * samples.std() * 10 ** rng.uniform(-2.0, -1.0)  # 40 to 20 dB below


def resample(samples, speed):
    """Speed up by a factor, pitch included: cut or extend the spectrum of the whole clip."""
    N = math.ceil(len(samples) / 320) * 320            # lengths with small factors: a fast FFT
    M = round(N / speed / 320) * 320
    spectrum = torch.fft.rfft(samples, N)
    return torch.fft.irfft(spectrum[:M // 2 + 1], M) * (M / N)


def draw_example(rng, telephone, kind, forbidden=frozenset(), translate=None):
    """One announcement of a kind that is not forbidden, with one task about it."""
    while True:
        said, translations, questions = KINDS[kind](rng)
        sentence = telephone.sentence(said)
        if sentence in forbidden:
            continue
        samples = telephone.clip(said, rng)
        if len(samples) <= MAX_SECONDS * RATE:
            break
    if translate is None:
        translate = rng.random() < 0.5
    prompt, answers = TRANSLATE, translations
    if not translate:
        prompt, answers = rng.choice(list(questions.items()))
    return {"kind": kind, "sentence": sentence, "samples": samples, "prompt": prompt,
            "answers": answers, "questions": questions}


def draw_split(rng, telephone, size, forbidden):
    """Clips of all kinds in turn, tasks in turn within each kind, no sentence twice."""
    examples, seen = [], set(forbidden)
    for i in range(size):
        kind = list(KINDS)[i % len(KINDS)]
        translate = (i // len(KINDS) + i) % 2 == 0
        examples.append(draw_example(rng, telephone, kind, seen, translate))
        seen.add(examples[-1]["sentence"])
    return examples


def write_opus(path, samples):
    """20 kbit/s; bit-exact, where libsndfile would draw a serial number for every file."""
    subprocess.run(["ffmpeg", "-v", "error", "-f", "f32le", "-ar", str(RATE), "-ac", "1", "-i", "-",
                    "-c:a", "libopus", "-b:a", "20k", "-frame_duration", "60",
                    "-flags", "+bitexact", "-fflags", "+bitexact", path],
                   input=samples.numpy().tobytes(), check=True)


def write_split(out, split, examples):
    folder = out / split
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with open(out / f"{split}.jsonl", "w", encoding="utf-8") as file:
        for i, example in enumerate(examples):
            audio = f"{split}/{i:03}.ogg"
            write_opus(out / audio, example["samples"])
            line = {"id": f"{split}-{i:03}", "audio": audio, "prompt": example["prompt"],
                    "reference": example["answers"][0]}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def build_processor(texts):
    """Byte-level BPE of 512 tokens learned from texts, log-mel features of 8 s, chat template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=512, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        additional_special_tokens=[t for t in SPECIAL if t not in ("<|im_end|>", "<|endoftext|>")],
        clean_up_tokenization_spaces=False, model_max_length=1024)
    features = WhisperFeatureExtractor(feature_size=80, chunk_length=MAX_SECONDS)
    return Qwen2AudioProcessor(features, tokenizer, chat_template=CHAT_TEMPLATE)


def build_model(tokenizer):
    """Qwen2-Audio with 2.3 million parameters instead of 8.4 billion."""
    config = Qwen2AudioConfig(
        audio_config=dict(
            model_type="qwen2_audio_encoder", num_mel_bins=80, d_model=128, encoder_layers=4,
            encoder_attention_heads=4, encoder_ffn_dim=512, max_source_positions=400),
        text_config=dict(
            model_type="qwen2", vocab_size=len(tokenizer), hidden_size=160, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=4, intermediate_size=432,
            max_position_embeddings=1024, bos_token_id=None, tie_word_embeddings=False,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id),
        audio_token_index=tokenizer.convert_tokens_to_ids("<|AUDIO|>"), tie_word_embeddings=False)
    model = Qwen2AudioForConditionalGeneration(config)
    # The encoder's positions are frozen; Whisper's sinusoids are what a checkpoint would bring.
    angle = torch.arange(400)[:, None] * torch.exp(-math.log(10000) / 63 * torch.arange(64))
    model.model.audio_tower.embed_positions.weight.data = torch.cat([angle.sin(), angle.cos()], 1)
    model.generation_config = GenerationConfig(
        eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id],
        pad_token_id=tokenizer.pad_token_id)
    return model


def render(processor, prompt):
    """The prompt as the stages render it."""
    content = [{"type": "audio"}, {"type": "text", "text": prompt}]
    return processor.apply_chat_template([{"role": "user", "content": content}],
                                         add_generation_prompt=True, tokenize=False)


def collate(processor, examples, answers):
    """Model inputs of prompt + answer; labels count on the answer and its <|im_end|> only."""
    tokenizer = processor.tokenizer
    answers = [answer + tokenizer.eos_token for answer in answers]
    inputs = processor(
        text=[render(processor, x["prompt"]) + answer for x, answer in zip(examples, answers)],
        audio=[x["samples"].numpy() for x in examples], sampling_rate=RATE,
        padding=True, padding_side="right", return_tensors="pt")
    ends = inputs["attention_mask"].sum(1, keepdim=True)                         # (N, 1)
    sizes = torch.tensor([[len(ids)] for ids in tokenizer(answers)["input_ids"]])
    position = torch.arange(inputs["input_ids"].shape[1])
    counted = (position >= ends - sizes) & (position < ends)                     # (N, positions)
    inputs["labels"] = inputs["input_ids"].masked_fill(~counted, -100)
    return inputs


def ctc_loss(logits, frames, sentences):
    """logits (N, frames, letters) against the letters of the English words."""
    targets = [torch.tensor([LETTERS.index(c) + 1 for c in s]) for s in sentences]
    return F.ctc_loss(logits.float().log_softmax(-1).transpose(0, 1), torch.cat(targets), frames,
                      torch.tensor([len(t) for t in targets]), zero_infinity=True)


def train(model, ctc_head, processor, telephone, forbidden, steps, lr, phrasings, seed, args):
    """Train on sentences strung together on the fly; return the set of sentences met."""
    rng, met = random.Random(seed), set()
    torch.manual_seed(seed)
    parameters = [p for p in (*model.parameters(), *ctc_head.parameters()) if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(
        (step + 1) / args.warmup, 0.02 + 0.98 * (1 + math.cos(math.pi * step / steps)) / 2))
    heard = {}
    hook = model.model.audio_tower.register_forward_hook(
        lambda module, inputs, output: heard.update(states=output.last_hidden_state))
    model.train()
    bar = tqdm(range(steps), desc=f"{phrasings} phrasing(s)", mininterval=10)
    for _ in bar:
        examples = [draw_example(rng, telephone, rng.choice(list(KINDS)), forbidden)
                    for _ in range(args.batch_size)]
        inputs = collate(processor, examples, [x["answers"][rng.randrange(phrasings)]
                                               for x in examples])
        met.update(x["sentence"] for x in examples)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bfloat16):
            answer_loss = model(**inputs).loss
            letters = ctc_head(heard["states"])                                  # (N, 200, letters)
        _, frames = model.model.audio_tower._get_feat_extract_output_lengths(
            inputs["feature_attention_mask"].sum(1))
        listen_loss = ctc_loss(letters, frames, [x["sentence"] for x in examples])
        optimizer.zero_grad()
        (answer_loss + args.ctc_weight * listen_loss).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(answer=f"{answer_loss.item():.3f}", ctc=f"{listen_loss.item():.3f}")
    hook.remove()
    return met


@torch.inference_mode()
def answer_test(out, kinds, batch_size=16):
    """Share of test prompts that the model on disk answers as the reference does, per kind."""
    model = Qwen2AudioForConditionalGeneration.from_pretrained(out / "model", dtype=torch.float32)
    processor = Qwen2AudioProcessor.from_pretrained(out / "model")
    lines = [json.loads(line) for line in open(out / "test.jsonl", encoding="utf-8")]
    right = {kind: [] for kind in KINDS}
    for start in tqdm(range(0, len(lines), batch_size), desc="answering the test prompts"):
        batch = lines[start:start + batch_size]
        inputs = processor(
            text=[render(processor, x["prompt"]) for x in batch],
            audio=[soundfile.read(out / x["audio"], dtype="float32")[0] for x in batch],
            sampling_rate=RATE, padding=True, padding_side="left", return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=96, do_sample=False)
        texts = processor.batch_decode(output[:, inputs["input_ids"].shape[1]:],
                                       skip_special_tokens=True)
        for kind, x, text in zip(kinds[start:], batch, texts):
            right[kind].append(text == x["reference"])
    return right


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--sounds", required=True, help="folder with the two Debian packages")
    parser.add_argument("--out", type=Path, default="tests/demo", help="folder to write")
    parser.add_argument("--scratch", type=Path,
                        help="folder for the weights after each phase; what is there is not redone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train-clips", type=int, default=256)
    parser.add_argument("--test-clips", type=int, default=128)
    parser.add_argument("--steps", type=int, default=2400, help="phase 1: in the reference's words")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--generalist-steps", type=int, default=600,
                        help="phase 2: in one of three phrasings")
    parser.add_argument("--generalist-learning-rate", type=float, default=7e-4)
    parser.add_argument("--batch-size", type=int, default=16, help="clips a step")
    parser.add_argument("--warmup", type=int, default=50, help="steps of rising learning rate")
    parser.add_argument("--ctc-weight", type=float, default=1.0)
    parser.add_argument("--bfloat16", action="store_true",
                        help="autocast; many times slower on a CPU without bfloat16 instructions")
    return parser.parse_args()


def main():
    args = parse_args()
    rng = random.Random(args.seed)
    folder = tempfile.TemporaryDirectory()
    telephone = Telephone(args.sounds, folder.name)

    # 1. The clips, those of the test first: nothing else may say a sentence of theirs.
    test = draw_split(rng, telephone, args.test_clips, frozenset())
    forbidden = {x["sentence"] for x in test}
    train_split = draw_split(rng, telephone, args.train_clips, forbidden)
    assert not forbidden & {x["sentence"] for x in train_split}
    write_split(args.out, "test", test)
    write_split(args.out, "train", train_split)

    # 2. A tokenizer that knows the words of prompts and answers, and an empty model.
    samples = [draw_example(rng, telephone, kind, forbidden) for kind in KINDS for _ in range(200)]
    processor = build_processor([text for x in samples for text in (x["prompt"], *x["answers"])])
    torch.manual_seed(args.seed)
    model = build_model(processor.tokenizer)
    ctc_head = torch.nn.Linear(model.config.audio_config.d_model, len(LETTERS) + 1)
    print(f"{model.num_parameters() / 1e6:.2f} million parameters")

    # 3. Two phases of training.
    phases = [(args.steps, args.learning_rate, 1),
              (args.generalist_steps, args.generalist_learning_rate, 3)]
    for number, (steps, lr, phrasings) in enumerate(phases, start=1):
        kept = args.scratch and args.scratch / f"phase{number}.pt"
        if kept and kept.exists():
            print(f"phase {number} from {kept}")
            weights, head = torch.load(kept, weights_only=True)
            model.load_state_dict(weights)
            ctc_head.load_state_dict(head)
            continue
        start = time.time()
        met = train(model, ctc_head, processor, telephone, forbidden, steps, lr, phrasings,
                    args.seed + number, args)
        assert not forbidden & met, "a test sentence was trained on"
        print(f"phase {number}: {steps} steps, {time.time() - start:.0f} s, "
              f"{len(met)} different sentences")
        if kept:
            kept.parent.mkdir(parents=True, exist_ok=True)
            torch.save((model.state_dict(), ctc_head.state_dict()), kept)

    # 4. Half precision on disk, and a look at what came out.
    shutil.rmtree(args.out / "model", ignore_errors=True)
    model.half().save_pretrained(args.out / "model")
    processor.save_pretrained(args.out / "model")
    right = answer_test(args.out, [x["kind"] for x in test])
    for kind, marks in right.items():
        print(f"{kind:12} {sum(marks):3} of {len(marks):3} answered exactly as the reference")
    size = sum(path.stat().st_size for path in args.out.rglob("*") if path.is_file())
    print(f"{args.out}: {size / 1e6:.1f} MB; evaluate it with: python 06_eval.py")


if __name__ == "__main__":
    main()
