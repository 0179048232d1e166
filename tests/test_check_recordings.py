"""check_recordings.py: each way in which a recording can be bad, and what only looks like one."""
import json
import math
import re
import struct
import subprocess
import sys
from importlib import import_module

import pytest
import soundfile
import torch
from conftest import ROOT, TEST, call, shell

import check_recordings
from check_recordings import check_recording

RATE = 16000
SAMPLES = 60480


@pytest.fixture(scope="module")
def waves():
    """Speech-like noise that stops after two seconds, so that a variable bit rate varies."""
    noise = torch.randn(SAMPLES, generator=torch.Generator().manual_seed(0)) * 0.3
    noise[2 * RATE:] = 0
    return noise.clamp(-0.9, 0.9)


def written(path, wave, rate=RATE, **settings):
    soundfile.write(str(path), wave.numpy(), rate, **settings)
    return path


def problem(path, content=None):
    """What is wrong with a recording, with this content if any is given; "" if nothing is."""
    if content is not None:
        path.write_bytes(content)
    said, digest = check_recording(path, 3600)
    assert "\n" not in said and "cannot be read" not in said
    assert (said == "") == (digest is not None)
    return said


# Containers.

def without_first_frame(mp3):
    """An mp3 without its first frame, the one that says how long it is (MPEG-2, layer III)."""
    rates = [0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160]
    size = 72 * rates[mp3[2] >> 4] * 1000 // RATE + (mp3[2] >> 1 & 1)
    return mp3[size:]


@pytest.mark.parametrize("mode", ["CONSTANT", "VARIABLE"])
def test_mp3(tmp_path, waves, mode):
    path = written(tmp_path / "a.mp3", waves, format="MP3", bitrate_mode=mode,
                   compression_level=0.3)
    whole = path.read_bytes()
    tag = b"TAG" + b"a song".ljust(125, b"\0")
    apetag = b"APETAGEX" + b"a singer".ljust(200)
    title = b"ID3\3\0\0\0\0\2\0" + b"Information".ljust(256, b"\0")  # a tag of 2 * 128 bytes
    for content in (whole, whole + tag, whole + apetag + tag, title + whole, whole + bytes(100)):
        assert problem(path, content) == ""
    for content in (whole + whole, whole + tag + whole, whole + title + whole):
        assert "several recordings" in problem(path, content)
    assert "cut off" in problem(path, whole[:len(whole) // 2])
    assert "cut off" in problem(path, title + whole[:len(whole) // 2])
    assert "cut off" in problem(path, whole[:-5])
    header = max(whole.find(b"Xing"), whole.find(b"Info"))
    for frames, said in ((10, "longer than its header"), (200, "cut off"), (2**31 - 1, "lasts")):
        lie = whole[:header + 8] + struct.pack(">I", frames) + whole[header + 12:]
        assert said in problem(path, lie)


def test_an_mp3_without_a_header(tmp_path, waves):
    """Its length is a guess, right at a constant bit rate; too low or high at others."""
    for mode, said in (("CONSTANT", ""), ("VARIABLE", "is longer than its header")):
        path = written(tmp_path / "a.mp3", waves, format="MP3", bitrate_mode=mode,
                       compression_level=0.3)
        bare = without_first_frame(path.read_bytes())
        title = b"ID3\3\0\0\0\0\2\0" + b"Information".ljust(256, b"\0")
        assert problem(path, bare).startswith(said) and problem(path, title + bare).startswith(said)
    quiet_start = written(tmp_path / "a.mp3", waves.flip(0), format="MP3", bitrate_mode="VARIABLE",
                        compression_level=0.3)
    bare = without_first_frame(quiet_start.read_bytes())
    song = b"TAG" + b"Information".ljust(125, b"\0")
    for content in (bare, title + bare, bare + song):  # more samples are guessed than there are
        assert problem(quiet_start, content) == ""


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_ogg(tmp_path, waves, subtype):
    path = written(tmp_path / "a.ogg", waves, format="OGG", subtype=subtype)
    whole = path.read_bytes()
    other = written(tmp_path / "b.ogg", waves, format="OGG", subtype="VORBIS").read_bytes()
    assert problem(path, whole) == problem(path, whole + bytes(100)) == ""
    assert "several recordings" in problem(path, whole + whole)
    assert "several recordings" in problem(path, whole + other)
    assert "no page" in problem(path, whole + b"<html>")
    last_page = whole.rfind(b"OggS")
    for content in (whole[:len(whole) // 2], whole[:-9], whole[:last_page], whole[:last_page + 20]):
        assert "cut off" in problem(path, content)
    for place in (last_page - 100, last_page + 8):  # a sample; the number of samples
        damaged = bytearray(whole)
        damaged[place] ^= 0xFF
        assert "damaged" in problem(path, bytes(damaged))


def test_flac(tmp_path, waves):
    path = written(tmp_path / "a.flac", waves)
    whole = path.read_bytes()
    short = written(tmp_path / "b.flac", waves[:1000]).read_bytes()
    assert problem(path, whole) == problem(path, whole + b"TAG".ljust(128, b"\0")) == ""
    assert "several recordings" in problem(path, whole + short)

    def promising(samples):
        return whole[:21] + ((whole[21] & 0xF0) << 32 | samples).to_bytes(5, "big") + whole[26:]

    assert "longer than its header" in problem(path, promising(10000))
    assert "cut off" in problem(path, promising(2 * SAMPLES))
    assert "lasts" in problem(path, promising(2**36 - 1))
    assert "lasts" in problem(path, promising(0))  # unknown
    damaged = whole[:9000] + bytes(1000) + whole[10000:]
    for content in (whole[:len(whole) // 2], whole[:-10], damaged):
        assert "cut off or damaged" in problem(path, content)


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "ULAW", "DOUBLE", "IMA_ADPCM"])
def test_wav(tmp_path, waves, subtype):
    path = written(tmp_path / "a.wav", waves, subtype=subtype)
    whole = path.read_bytes()
    place = whole.find(b"data") + 4
    (size,) = struct.unpack("<I", whole[place:place + 4])

    def promising(promise):
        return whole[:place] + struct.pack("<I", promise) + whole[place + 4:]

    note = (b"LIST" + struct.pack("<I", 26) + b"INFOISFT" + struct.pack("<I", 14)
            + b"Lavf58.29.100\0")
    for content in (whole, whole + note, whole + note + note, whole + bytes(100),
                    whole[:4] + bytes(4) + whole[8:]):  # the size of all is wrong in many a file
        assert problem(path, content) == ""
    for stream in (0xFFFFFFFF, 0x7FFFF000):  # written by tools that do not know the length yet
        assert problem(path, promising(stream)) == ""
    assert f"{10**7 - size} bytes are missing" in problem(path, promising(10**7))
    assert "cut off" in problem(path, whole[:len(whole) // 2])
    assert "cut off" in problem(path, whole + note[:-9])
    junk = b"\1\2\3\4" + struct.pack("<I", 4) + b"more"
    assert "longer than its header" in problem(path, whole + junk)
    for lie in (0, 4096):  # what follows is no chunk
        assert problem(path, promising(lie)).startswith(("is longer than its header", "is cut off"))
    assert problem(path, whole + whole)  # libsndfile does not open it
    with pytest.raises(check_recordings.UserError, match="several recordings"):
        check_recordings.check_wav(whole + whole)


def test_wav_of_an_odd_size(tmp_path, waves):
    """A byte follows it, which some writers forget; and all numbers may be big-endian."""
    path = written(tmp_path / "a.wav", waves[:20001], subtype="PCM_U8")
    whole = path.read_bytes()
    note = b"LIST\x04\0\0\0INFO"
    size = len(whole) - len(whole) % 2
    assert problem(path, whole[:size].ljust(len(whole), b"\0") + note) == ""
    end = whole.find(b"data") + 8 + 20001
    assert problem(path, whole[:end] + note) == problem(path, whole[:end] + b"\0" + note) == ""
    path = written(tmp_path / "b.wav", waves, endian="BIG")
    assert path.read_bytes().startswith(b"RIFX") and problem(path) == ""
    assert "cut off" in problem(path, path.read_bytes()[:-1000])


def test_what_is_no_recording(tmp_path, waves):
    assert problem(tmp_path / "gone.wav") == problem(tmp_path) == "is missing"
    for name in ("a.wav", "a.flac", "a.ogg", "a.mp3", "a"):
        for content in (b"", b"RIFF", b"OggS", bytes(range(256)) * 20, b"<html>not found</html>"):
            assert "corrupt" in problem(tmp_path / name, content)
    for name in ("a.aiff", "a.au", "a.w64"):
        path = written(tmp_path / name, waves)
        assert "01 does not read" in problem(path)
    assert "GSM610" in problem(written(tmp_path / "gsm.wav", waves, subtype="GSM610"))
    assert "empty" in problem(written(tmp_path / "a.wav", waves[:0]))


# Samples.

def test_samples_that_are_not_numbers(tmp_path, waves):
    for value in (math.nan, math.inf, -math.inf):
        wave = waves.clone()
        wave[50] = value
        assert "NaN" in problem(written(tmp_path / "a.wav", wave, subtype="FLOAT"))


def test_samples_on_the_scale_of_integers(tmp_path, waves):
    wave = waves.clone()
    wave[SAMPLES - 1] = -12000
    assert "12000" in problem(written(tmp_path / "a.wav", wave, subtype="FLOAT"))
    early = torch.cat([-12000 * torch.ones(1), waves, waves])  # it is decoded in blocks
    assert "12000" in problem(written(tmp_path / "a.wav", early, subtype="FLOAT"))
    wave[SAMPLES - 1] = -3  # a decoder may go beyond 1
    assert problem(written(tmp_path / "a.wav", wave, subtype="FLOAT")) == ""


@pytest.mark.parametrize("rate, good", [(999, False), (1000, True), (768000, True),
                                        (768001, False), (2 * 10**9, False)])
def test_rates(tmp_path, waves, rate, good):
    said = problem(written(tmp_path / "a.wav", waves, rate))
    assert said == ("" if good else f"claims {rate} samples a second")


def test_a_length_is_looked_at_before_anything_is_decoded(tmp_path):
    """Hours of silence take little room in a file, and blocks of them little memory."""
    code = ("import re, resource, sys\n"
            "sys.path.insert(0, 'tests')\n"
            "from check_recordings import check_recording\n"
            "used = int(re.search(r'VmData:\\s+(\\d+) kB', open('/proc/self/status').read())[1])\n"
            "resource.setrlimit(resource.RLIMIT_DATA, (used * 1024 + 60 * 2**20, -1))\n"
            "print(check_recording(sys.argv[1], 30)[0])\n"
            "print(check_recording(sys.argv[1], 3600)[0])")
    long = tmp_path / "half_an_hour.flac"  # 115 MB of float32
    with soundfile.SoundFile(str(long), "w", RATE, 1) as file:
        for _ in range(30):
            file.write(torch.zeros(60 * RATE, dtype=torch.int16).numpy())
    done = subprocess.run([sys.executable, "-c", code, long], cwd=ROOT, text=True,
                          capture_output=True)
    said = done.stdout.splitlines()
    assert said[0] == "lasts 1800.00 s by its header, more than 30 s", done
    assert said[1] == "is silent: nothing is above -60 dB" and not done.stderr, done


# Sound.

def test_silence(tmp_path, waves):
    loud = written(tmp_path / "loud.wav", waves / waves.abs().max() * 0.0011, subtype="FLOAT")
    quiet = written(tmp_path / "quiet.wav", waves / waves.abs().max() * 0.0009, subtype="FLOAT")
    assert problem(loud) == "" and problem(quiet) == "is silent: nothing is above -60 dB"
    for place in (0, 2 * SAMPLES - 1):
        click = torch.zeros(2 * SAMPLES)
        click[place] = -0.5
        assert problem(written(tmp_path / "click.wav", click)) == ""


def test_channels_that_cancel(tmp_path, waves):
    opposed = written(tmp_path / "a.wav", torch.stack([waves, -waves], dim=1))
    assert "channels cancel" in problem(opposed)
    one_sided = written(tmp_path / "b.wav", torch.stack([waves, 0 * waves], dim=1))
    assert problem(one_sided) == ""


@pytest.mark.parametrize("settings", [{"subtype": "PCM_U8"}, {"subtype": "PCM_16"},
                                      {"subtype": "ULAW"}, {"subtype": "ALAW"}])
def test_clipping(tmp_path, waves, settings):
    for share, good in ((0.009, True), (0.011, False)):
        wave = waves.clone()
        wave[:round(share * SAMPLES)] = 1
        wave[:round(share * SAMPLES):2] = -1
        said = problem(written(tmp_path / "a.wav", wave, **settings))
        assert said == ("" if good else "is clipped: 1.1% of its samples are at full scale")


def test_clipping_is_a_share_of_all_channels(tmp_path, waves):
    wave = torch.stack([waves, waves / 2], dim=1)
    wave[:round(0.018 * SAMPLES), 0] = 1
    assert problem(written(tmp_path / "a.wav", wave)) == ""
    wave[:round(0.022 * SAMPLES), 0] = 1
    assert "is clipped: 1.1%" in problem(written(tmp_path / "a.wav", wave))


def test_clipping_before_lossy_compression(tmp_path, waves):
    path = written(tmp_path / "a.ogg", (waves * 4).clamp(-1, 1), format="OGG", subtype="VORBIS")
    assert "clipped" in problem(path)


def test_an_error_of_any_kind_is_a_line(tmp_path, waves, monkeypatch):
    monkeypatch.setattr(check_recordings, "examine", lambda *_: 1 / 0)
    said, _ = check_recording(tmp_path, 3600)
    assert said == "cannot be read: ZeroDivisionError: division by zero"


# The report.

@pytest.fixture
def corpus(tmp_path, waves):
    """A manifest with blank lines, copies of a recording, one in another format, bad ones."""
    written(tmp_path / "a.wav", waves)
    copy, _ = soundfile.read(str(tmp_path / "a.wav"), dtype="int16")
    soundfile.write(str(tmp_path / "copy.flac"), copy, RATE)
    written(tmp_path / "same but\nslow.wav", waves, RATE // 2)
    written(tmp_path / "silent.wav", waves * 0)
    (tmp_path / "cut.wav").write_bytes((tmp_path / "a.wav").read_bytes()[:9000])
    rows = [("a.wav", "Say it.", "Yes."), ("gone.wav", "Say it.", "Yes."), None,
            ("copy.flac", "Say it.", "Yes."), ("copy.flac", "Say it.", "No."), None, None,
            ("a.wav", "Translate.", "Yes."), ("silent.wav", "Say it.", "Yes."),
            ("cut.wav", "Say it.", "Yes."), ("same but\nslow.wav", "Say it.", "Yes."),
            ("a.wav", "Say it.", "Yes."), ("silent.wav", "Say it.", "Yes.")]
    lines = []
    for row in rows:
        line = dict(zip(("audio", "prompt", "reference"), row), id="x") if row else None
        lines.append(json.dumps(line) if row else "  ")
    path = tmp_path / "manifest.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def report(manifest, capsys, jobs=1, max_seconds=3600):
    """The exit status, and the lines on stdout, of the tool in this process."""
    options = type("Options", (), {"manifest": manifest, "jobs": jobs, "max_seconds": max_seconds})
    status = 0
    try:
        check_recordings.main(options)
    except SystemExit as stop:
        status = stop.code
    return status, capsys.readouterr().out.splitlines()


def test_the_report(corpus, capsys):
    folder = corpus.parent
    status, lines = report(corpus, capsys)
    assert lines == [f"line 2: {folder}/gone.wav is missing",
                     f"line 4: {folder}/copy.flac has the audio, prompt and reference of line 1",
                     f"line 9: {folder}/silent.wav is silent: nothing is above -60 dB",
                     f"line 10: {folder}/cut.wav is cut off: 112004 bytes are missing",
                     f"line 12: {folder}/a.wav has the audio, prompt and reference of line 1",
                     f"line 13: {folder}/silent.wav is silent: nothing is above -60 dB",
                     "6 of 10 recordings are bad"]
    assert status == 1
    assert report(corpus, capsys, jobs=2) == (status, lines)


def test_the_report_of_a_longest_recording(corpus, capsys):
    status, lines = report(corpus, capsys, max_seconds=4)
    assert status == 1 and (f"line 11: {corpus.parent}/same but?slow.wav lasts 7.56 s by its "
                            "header, more than 4 s") in lines


def test_a_manifest_in_utf_16(tmp_path, waves, capsys):
    written(tmp_path / "a.wav", waves)
    row = json.dumps({"audio": "a.wav", "prompt": "Ċ", "reference": "Ja."}, ensure_ascii=False)
    (tmp_path / "manifest.jsonl").write_text(f"\n{row}\n\n{row}\n", encoding="utf-16")
    status, lines = report(tmp_path / "manifest.jsonl", capsys)
    assert status == 1 and len(lines) == 2
    assert lines[0].startswith("line 4: ") and "of line 2" in lines[0]


def test_a_manifest_that_cannot_be_read(tmp_path, capsys):
    bad = tmp_path / "bad.jsonl"
    for content in ("", "{}", '{"audio": "a.wav", "prompt": "p"}'):
        bad.write_text(content)
        status, lines = report(bad, capsys)
        assert str(bad) in status and "\n" not in status and not lines
    status, lines = report(tmp_path / "gone.jsonl", capsys)
    assert "gone.jsonl" in status and not lines


def test_the_demo_is_fine_and_what_a_user_sees(capsys):
    done = shell("tests/check_recordings.py", TEST, "--jobs", 2)
    assert (done.returncode, done.stdout) == (0, "128 recordings are fine\n"), done
    assert "checking: 100%" in done.stderr and "128/128" in done.stderr
    with pytest.raises(SystemExit, match="2"):
        call("tests/check_recordings.py", TEST, "--jobs", 0)
    assert "at least 1" in capsys.readouterr().err


def test_nothing_in_a_stage_needs_it():
    for stage in ROOT.glob("0?_*.py"):
        assert not re.search(r"import.*check_recordings", stage.read_text(encoding="utf-8"))
    assert import_module("01_sample").UserError is check_recordings.UserError
