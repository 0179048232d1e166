"""Which recordings of this manifest are bad, before a long run finds out in its seventh round?

libsndfile, by which 01 reads them, makes do with what is there: half a recording is a shorter one.
Here a file is decoded to its end, and its container has to agree. A line per bad recording says
what is wrong, the first thing found:

file       missing, corrupt, not wav, flac, ogg or mp3; longer than --max-seconds by its header
container  cut off, damaged, several recordings in one, or not what its header promises. An mp3
           without a header (Xing, Info, VBRI) promises nothing: cut off, it passes
samples    none, NaN or infinite, on the scale of integers, or at an impossible rate
sound      nothing above -60 dB in the mono mix, which is what a model hears; or clipped
manifest   an earlier line has the same audio (as decoded), prompt and reference

The exit status is 0 if all are fine, else 1.

Run     python tests/check_recordings.py tests/demo/train.jsonl           256 clips, 2 cores: 4 s
        python tests/check_recordings.py mine.jsonl --max-seconds 30      10,000 FLAC of 10 s: 1 min
"""
import argparse
import hashlib
import json
import math
import os
import re
import signal
import sys
import zlib
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib import import_module
from pathlib import Path

import soundfile
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sampling = import_module("01_sample")
UserError = sampling.UserError

SILENCE = 0.001  # -60 dB
FULL_SCALE = 0.98  # where clipped mu-law ends; A-law at 0.984, 8 bits at 0.992, 16 bits at 1
CLIPPED = 0.01  # of all samples: loud speech touches full scale in single peaks
STREAM = 0x7FFFF000  # a WAV's size from here on: its writer did not know it yet
MIRRORED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))  # the bits of each byte


def main(args):
    try:
        examples = sampling.read_manifest(args.manifest)
    except (UserError, OSError) as error:
        sys.exit(f"check_recordings.py: {error}")
    num_bad = 0
    line = 1
    first_lines = {}  # (audio, prompt, reference): the first line that has them
    with ProcessPoolExecutor(args.jobs, initializer=start_worker) as pool:
        try:
            paths = dict.fromkeys(example["audio"] for example in examples)  # each recording once
            checks = {path: pool.submit(check_recording, path, args.max_seconds) for path in paths}
            bar = tqdm(examples, desc="checking", unit="clip")
            for example, line in zip(bar, line_numbers(args.manifest)):
                problem, digest = checks[example["audio"]].result()
                key = (digest, example["prompt"], example["reference"])
                if not problem and first_lines.setdefault(key, line) != line:
                    problem = f"has the audio, prompt and reference of line {first_lines[key]}"
                if problem:
                    num_bad += 1
                    text = f"line {line}: {example['audio']} {problem}"
                    tqdm.write("".join(c if c.isprintable() else "?" for c in text))
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            sys.exit("stopped")
        except BrokenProcessPool:
            sys.exit(f"a worker was killed at line {line} or soon after: memory may be full")
    if num_bad:
        print(f"{num_bad} of {len(examples)} recordings are bad")
        sys.exit(1)
    print(f"{len(examples)} recordings are fine")


def line_numbers(path):
    """Where the examples stand in the manifest: read_manifest leaves out blank lines."""
    content = Path(path).read_bytes()
    lines = content.decode(json.detect_encoding(content), errors="replace").split("\n")
    return [number for number, line in enumerate(lines, start=1) if line.strip()]


def start_worker():
    """Ctrl-C is for the parent, and mpg123's notes on stderr would run into the progress bar."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


# -- A recording. --------------------------------------------------------------------------------
def check_recording(path, max_seconds):
    """What is wrong with it ("" if nothing is), and a digest of its samples (None if not read)."""
    try:
        return "", examine(path, max_seconds)
    except UserError as error:
        return str(error), None
    except soundfile.LibsndfileError as error:  # a FLAC tells it by failing
        return f"is cut off or damaged: {error}", None
    except Exception as error:  # of any library: the other recordings are to be checked as well
        return f"cannot be read: {type(error).__name__}: {error}", None


def examine(path, max_seconds):
    """A digest of the samples of a good recording, UserError for a bad one."""
    if not Path(path).is_file():  # a pipe would be waited for
        raise UserError("is missing")
    with open(path, "rb") as file:
        try:
            sound = soundfile.SoundFile(file)
        except soundfile.LibsndfileError as error:
            raise UserError("is corrupt, or not wav, flac, ogg or mp3") from error
        is_wav = sound.format in ("WAV", "WAVEX")
        if not is_wav and sound.format not in ("FLAC", "OGG", "MP3") or not sound.seekable():
            raise UserError(f"is {sound.format} {sound.subtype}, which 01 does not read")
        if not 1000 <= sound.samplerate <= 768000:
            raise UserError(f"claims {sound.samplerate} samples a second")
        seconds = sound.frames / sound.samplerate  # hours of silence take little room in a file
        if seconds > max_seconds:
            raise UserError(f"lasts {seconds:.2f} s by its header, more than {max_seconds:g} s")
        content = Path(path).read_bytes()  # subtle: not from `file`, where libsndfile has its place
        if is_wav:
            check_wav(content)
        elif sound.format == "OGG":
            check_ogg(content)
        digest, num_read = check_samples(sound)
        rest = content[file.tell():]  # what libsndfile has left unread
    begins = re.findall(rb'fLaC[\x00\x80]\x00\x00"', content)  # a short FLAC leaves no rest
    if sound.format in ("FLAC", "MP3") and (not is_tag(rest) or len(begins) > 1):
        raise UserError("is longer than its header says, or holds several recordings")
    is_guess = sound.format == "MP3" and not mp3_has_length(content)
    if num_read < sound.frames and not is_guess:
        raise UserError(f"is cut off or damaged: it has {num_read} of {sound.frames} samples")
    return digest


def check_samples(sound):
    """Decodes an open recording: a digest of all samples, and their number per channel."""
    digest = hashlib.sha256(f"{sound.samplerate} {sound.channels}".encode())
    num_read = 0
    num_full = 0
    peak = 0.0  # of all channels
    mono_peak = 0.0
    while len(samples := sound.read(2**16, dtype="float32", always_2d=True)):  # (2**16, channels)
        level = abs(samples)
        loudest = level.max()
        if not math.isfinite(loudest):
            raise UserError("is corrupt: some samples are NaN or infinite")
        digest.update(samples)
        num_read += len(samples)
        num_full += (level >= FULL_SCALE).sum()
        peak = max(peak, loudest)
        mono_peak = max(mono_peak, abs(samples.mean(axis=1)).max())
    if num_read == 0:
        raise UserError("is empty: it has no samples")
    if peak > 10:
        raise UserError(f"has a sample of {peak:g}: audio lies between -1 and 1")
    if peak < SILENCE:
        raise UserError("is silent: nothing is above -60 dB")
    if mono_peak < SILENCE:
        raise UserError("is silent: its mono mix is, the channels cancel")
    share = num_full / (num_read * sound.channels)
    if share > CLIPPED:
        raise UserError(f"is clipped: {share:.1%} of its samples are at full scale")
    return digest.digest(), num_read


# -- Containers. ---------------------------------------------------------------------------------
def is_tag(rest):
    """Whether the bytes after a recording are none, padding or a text tag (an ID3v1 has 128)."""
    rest = rest.strip(b"\0")
    return not rest or rest.startswith(b"APETAGEX") or rest.startswith(b"TAG") and len(rest) <= 128


def check_wav(content):
    """A WAV is a row of chunks to its end: a name, a size, as many bytes. One holds the samples."""
    order = "big" if content.startswith(b"RIFX") else "little"
    position = 12  # after RIFF, a size that many writers leave wrong, and WAVE
    while len(content) >= position + 8 and not is_tag(content[position:]):
        name = content[position:position + 4]
        size = int.from_bytes(content[position + 4:position + 8], order)
        if name == b"data" and size >= STREAM:
            return
        if name == b"RIFF" or not re.fullmatch(rb"[ -~]{4}", name):  # more samples, for instance
            raise UserError("is longer than its header says, or holds several recordings")
        position += 8 + size
        if position > len(content):
            raise UserError(f"is cut off: {position - len(content)} bytes are missing")
        if size % 2 and content[position:position + 1] == b"\0":  # some writers forget this one
            position += 1


def check_ogg(content):
    """An Ogg is a row of pages to its end: 27 bytes, the lengths of segments, the segments. A page
    that is damaged libsndfile leaves out, without a word, and a second of speech with it."""
    position = 0
    number = 0
    flags = 0
    while content.startswith(b"OggS", position):
        page = content[position:position + 2**16].ljust(27, b"\0")  # none is longer than 2**16
        page = page[:27 + page[26] + sum(page[27:27 + page[26]])]
        if int.from_bytes(page[22:26], "little") != ogg_checksum(page):
            raise UserError(f"is cut off or damaged in page {number} of the Ogg")
        flags = page[5]
        if number > 0 and flags & 2:  # this is the first page of a stream
            raise UserError("holds several recordings")
        position += len(page)
        number += 1
    if not is_tag(content[position:]):
        raise UserError("holds something that is no page of the Ogg")
    if not flags & 4:  # this is the last page of a stream
        raise UserError("is cut off: its last page is missing")


def ogg_checksum(page):
    """The CRC of a page, its own four bytes taken as 0. It is zlib's with the bits of each byte,
    and of the result, in the other order, and without the inversions before and after."""
    page = page[:22] + bytes(4) + page[26:]
    checksum = zlib.crc32(page.translate(MIRRORED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{checksum:032b}"[::-1], 2)


def mp3_has_length(content):
    """Whether an mp3 says how long it is, in its first frame; libsndfile guesses otherwise."""
    start = 0
    if content.startswith(b"ID3"):  # a tag comes first, its size in four bytes of 7 bits
        start = 10 + (content[6] << 21 | content[7] << 14 | content[8] << 7 | content[9])
    return re.search(b"Xing|Info|VBRI", content[start:start + 200]) is not None


def parse_args():
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("manifest", help="JSON lines: audio, prompt, reference")
    parser.add_argument("--max-seconds", type=float, default=3600, help="longest good recording")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="recordings at a time")
    args = parser.parse_args()
    if args.jobs < 1:
        parser.error(f"--jobs is {args.jobs}: at least 1")
    return args


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")
    main(parse_args())
