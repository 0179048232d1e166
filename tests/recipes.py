"""Manifests of the paper's data, from the folders that the commands in tests/recipes.md fetch.

Run     python tests/recipes.py librisqa FOLDER      questions about LibriSpeech, answered
        python tests/recipes.py covost2 FOLDER       Common Voice, translated into German
Writes  FOLDER/train.jsonl, FOLDER/test.jsonl
"""
import argparse
import csv
import json
import sys
from pathlib import Path

LIBRISQA_PROMPT = "Listen to the audio <audio> and answer the following question: "
COVOST2_PROMPT = "<audio> Listen to the speech and translate it into German."

def librisqa(folder):
    """LibriSQA part I: {"train": [row of a manifest], "test": [...]}."""
    manifests = {}
    for split, part in (("train", "train-clean-360"), ("test", "test-clean")):
        path = folder / "LibriSQA-PartI" / f"LibriSQA-PartI-{split}.json"
        manifests[split] = []
        for row in json.loads(path.read_text(encoding="utf-8")):
            name = Path(row["speech_path"]).stem  # says .wav, but LibriSpeech is .flac
            speaker, chapter, _ = name.split("-")
            audio = f"LibriSpeech/{part}/{speaker}/{chapter}/{name}.flac"
            manifests[split].append({"id": name, "audio": audio, "reference": row["answer"],
                                     "prompt": LIBRISQA_PROMPT + row["question"]})
    return manifests

def covost2(folder):
    """CoVoST 2, English to German: {"train": [row of a manifest], "test": [...]}. Rows without a
    translation, and those whose clip is missing or empty, are left out."""
    manifests = {"train": [], "test": []}
    with open(folder / "covost_v2.en_de.tsv", encoding="utf-8", newline="") as table:
        for row in csv.DictReader(table, delimiter="\t", quoting=csv.QUOTE_NONE, escapechar="\\"):
            split = row["split"].replace("train_covost", "train")
            clip = folder / "clips" / row["path"]
            is_there = clip.exists() and clip.stat().st_size > 0
            if split in manifests and row["translation"].strip() and is_there:
                manifests[split].append({"id": row["path"], "audio": f"clips/{row['path']}",
                                         "prompt": COVOST2_PROMPT, "reference": row["translation"]})
    return manifests

def main():
    parser = argparse.ArgumentParser(description="Write the manifests of the paper's data.")
    parser.add_argument("corpus", choices=["librisqa", "covost2"])
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    try:
        manifests = {"librisqa": librisqa, "covost2": covost2}[args.corpus](args.folder)
    except OSError as error:
        sys.exit(f"{error.filename} cannot be read: tests/recipes.md says how to get it")
    for split, rows in manifests.items():
        path = args.folder / f"{split}.jsonl"
        if not rows:
            sys.exit(f"no prompts for {path}: do the files lie where tests/recipes.md puts them?")
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        path.write_text("".join(lines), encoding="utf-8")
        print(f"{len(rows)} prompts -> {path}")

if __name__ == "__main__":
    main()
