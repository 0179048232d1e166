"""Does a recording reach the model as it sounds, in mono and at its rate? Is what is none refused?"""
import math
from importlib import import_module

import pytest
import soundfile
import torch

sampling = import_module("01_sample")

RATE = 16000
RATES = [8000, 11025, 16000, 22050, 44100, 48000]


def burst(frequency, rate, seconds=0.48):
    """A tone that swells and fades, (S,) float64: known at every instant, so at every rate."""
    t = torch.arange(round(seconds * rate), dtype=torch.float64) / rate
    return torch.sin(2 * math.pi * frequency * t) * torch.sin(math.pi * t / seconds) ** 2


def written(path, wave, rate, **settings):
    soundfile.write(str(path), wave.numpy(), rate, **settings)
    return path


# The resampler.

@pytest.mark.parametrize("old", RATES)
@pytest.mark.parametrize("new", [8000, 16000, 44100])
def test_resampled_tone_is_the_tone_at_the_new_rate(old, new):
    found = sampling.resample(burst(440, old).float(), old, new)
    wanted = burst(440, new).float()
    assert found.dtype == torch.float32 and found.shape == wanted.shape
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)


def test_what_the_new_rate_cannot_hold_is_removed():
    low, high = burst(1000, 16000), burst(6000, 16000)  # 8000 Hz hold up to 4000
    found = sampling.resample((low + high).float(), 16000, 8000)
    torch.testing.assert_close(found, burst(1000, 8000).float(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("samples", [1, 2, 7, 441, 1000])
@pytest.mark.parametrize("old, new", [(44100, 16000), (11025, 16000), (8000, 16000), (16000, 11025)])
def test_length_is_rounded_up(samples, old, new):
    assert len(sampling.resample(torch.ones(samples), old, new)) == math.ceil(samples * new / old)


def test_the_end_does_not_run_into_the_beginning():
    """The Fourier transform takes a signal for periodic; a click at its end must stay there."""
    wave = torch.zeros(44100)
    wave[-1] = 1.0
    assert sampling.resample(wave, 44100, 16000)[:100].abs().max() < 1e-3


# Files.

@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("subtype", ["PCM_16", "FLOAT"])
def test_wav(tmp_path, rate, channels, subtype):
    tone = burst(440, rate)
    path = written(tmp_path / "a.wav", torch.stack([tone / channels * (2 * c + 2) / (channels + 1)
                                                    for c in range(channels)], dim=1), rate, subtype=subtype)
    found = sampling.load_audio(path, RATE)
    wanted = burst(440, RATE).float() / channels  # the mean of the channels
    assert found.dtype == torch.float32 and found.shape == wanted.shape
    torch.testing.assert_close(found, wanted, atol=2e-4, rtol=0)


@pytest.mark.parametrize("name, settings, slack", [
    ("a.flac", {}, 1e-3),
    ("a.ogg", {"format": "OGG", "subtype": "VORBIS"}, 0.05),
    ("a.mp3", {"format": "MP3"}, 0.05),
])
@pytest.mark.parametrize("rate", [16000, 44100])
def test_other_formats(tmp_path, name, settings, slack, rate):
    path = written(tmp_path / name, burst(440, rate) * 0.8, rate, **settings)
    found, wanted = sampling.load_audio(path, RATE), burst(440, RATE).float() * 0.8
    assert found.dtype == torch.float32 and abs(len(found) - len(wanted)) <= 0.08 * RATE
    n = min(len(found), len(wanted))
    torch.testing.assert_close(found[:n], wanted[:n], atol=slack, rtol=0)


def test_stereo_is_the_mean_of_its_channels(tmp_path):
    left, right = torch.randn(2, 400, generator=torch.Generator().manual_seed(0)) / 10
    path = written(tmp_path / "a.wav", torch.stack([left, right], dim=1), RATE, subtype="FLOAT")
    torch.testing.assert_close(sampling.load_audio(path, RATE), (left + right) / 2)
    opposed = written(tmp_path / "b.wav", torch.stack([left, -left], dim=1), RATE, subtype="FLOAT")
    assert sampling.load_audio(opposed, RATE).eq(0).all()


# Mistakes.

def refused(path, *words, **settings):
    with pytest.raises(sampling.UserError) as error:
        sampling.load_audio(path, RATE, **settings)
    sentence = str(error.value)
    assert "\n" not in sentence and all(word in sentence for word in (str(path), *words)), sentence
    return sentence


def test_a_missing_recording(tmp_path):
    refused(tmp_path / "gone.wav")
    refused(tmp_path)  # a folder is no recording


@pytest.mark.parametrize("content", [b"", b"RIFF", bytes(range(256)) * 20, b"<html>not found</html>"],
                         ids=["empty", "cut header", "garbage", "web page"])
@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg", "a.mp3", "a.raw", "a"])
def test_what_is_no_recording(tmp_path, content, name):
    path = tmp_path / name
    path.write_bytes(content)
    refused(path)


def test_a_recording_without_samples(tmp_path):
    refused(written(tmp_path / "silent.wav", torch.zeros(0), RATE), "empty")


def test_samples_that_are_not_numbers(tmp_path):
    wave = torch.zeros(100)
    wave[50] = math.nan
    refused(written(tmp_path / "nan.wav", wave, RATE, subtype="FLOAT"))


def test_a_recording_longer_than_the_model_hears(tmp_path):
    path = written(tmp_path / "long.wav", torch.zeros(9 * 8000), 8000)
    assert "corrupt" not in refused(path, "9.00 s", "more than 8 s", max_seconds=8)
    assert len(sampling.load_audio(path, RATE, max_seconds=9)) == 9 * RATE
