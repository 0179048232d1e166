"""What does a manifest say, and which line of it is wrong?"""
import json
from importlib import import_module

import pytest
from conftest import refusal

sampling = import_module("01_sample")

GOOD = {"audio": "clips/a.wav", "prompt": "Translate.", "reference": "Hallo."}
GOOD_LINE = json.dumps(GOOD)


def manifest(folder, *lines):
    path = folder / "manifest.jsonl"
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines))
    return path


def refused(path, *words):
    with pytest.raises(sampling.UserError) as error:
        sampling.read_manifest(path)
    sentence = str(error.value)
    assert "\n" not in sentence and all(word in sentence for word in (str(path), *words)), sentence


def test_a_good_manifest(tmp_path):
    path = manifest(tmp_path, GOOD_LINE, json.dumps({**GOOD, "id": "b", "speaker": 7}))
    first, second = sampling.read_manifest(path)
    assert first == {"id": "1", "audio": str(tmp_path / "clips" / "a.wav"), "prompt": "Translate.",
                     "reference": "Hallo."}
    assert second == {**first, "id": "b", "speaker": 7}


def test_ids_are_strings_and_count_lines(tmp_path):
    named = [json.dumps({**GOOD, "id": name}) for name in (17, 0, None)]
    path = manifest(tmp_path, "", GOOD_LINE, *named)
    assert [example["id"] for example in sampling.read_manifest(path)] == ["2", "17", "0", "5"]


def test_blank_lines_and_other_line_ends(tmp_path):
    path = manifest(tmp_path, GOOD_LINE + "\r", "  ", GOOD_LINE, "", "")
    assert len(sampling.read_manifest(path)) == 2


def test_any_letter_may_stand_in_a_line(tmp_path):
    reference = "Grüße 日本 😀 a\u2028b\u0085c"
    path = manifest(tmp_path, json.dumps({**GOOD, "reference": reference}, ensure_ascii=False))
    assert sampling.read_manifest(path)[0]["reference"] == reference


def test_a_missing_manifest(tmp_path):
    for path in (tmp_path / "gone.jsonl", tmp_path):
        assert str(path) in refusal("01_sample.py", "--run", tmp_path / "run", "--manifest", path)


@pytest.mark.parametrize("lines", [[], [""], ["", "  ", "\t"]])
def test_an_empty_manifest(tmp_path, lines):
    refused(manifest(tmp_path, *lines), "empty")


@pytest.mark.parametrize("line", ["{broken", "audio,prompt,reference", "{'audio': 'a'}", GOOD_LINE[:-3],
                                  GOOD_LINE + GOOD_LINE, b'{"audio": "\xff"}',
                                  GOOD_LINE.replace("Hallo.", "\\ud83d")])
def test_a_line_that_is_not_json(tmp_path, line):
    refused(manifest(tmp_path, GOOD_LINE, "", line, GOOD_LINE), "line 3", "JSON")


@pytest.mark.parametrize("line", ["[]", "7", "null", '"text"', "[" + GOOD_LINE + "]"])
def test_a_line_that_is_no_object(tmp_path, line):
    refused(manifest(tmp_path, GOOD_LINE, line), "line 2")


@pytest.mark.parametrize("key", ["audio", "prompt", "reference"])
@pytest.mark.parametrize("value", [None, "", "   ", 7, ["a"], {}, False])
def test_a_key_without_a_string(tmp_path, key, value):
    refused(manifest(tmp_path, GOOD_LINE, GOOD_LINE, json.dumps({**GOOD, key: value})), "line 3", key)


@pytest.mark.parametrize("key", ["audio", "prompt", "reference"])
def test_a_key_that_is_missing(tmp_path, key):
    refused(manifest(tmp_path, json.dumps({name: GOOD[name] for name in GOOD if name != key})), "line 1", key)


def test_two_places_for_one_recording(tmp_path):
    refused(manifest(tmp_path, json.dumps({**GOOD, "prompt": "<audio> and <audio>"})), "line 1")


def test_the_order_of_a_seed_stays():
    """A run that an earlier version began goes on with the prompts that it has not seen."""
    assert sampling.next_slice(total=4, start=2, count=6, seed=0) == [0, 3, 1, 2, 0, 3]
