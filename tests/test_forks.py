"""What people who fork the project do in the first days: nothing is silently wrong, no work is lost."""
import inspect
import json
import os
import re
import shutil
import unicodedata
from importlib import import_module
from pathlib import Path

import numpy
import pytest
import torch
from conftest import MODEL, ROOT, SMALL, TEST, TRAIN, call, load, parsed, refusal

sampling = import_module("01_sample")
tree = import_module("03_tree")
advantage = import_module("04_advantage")

EVALUATION = ["--manifest", TEST, "--num-prompts", 1, "--passes", 1, "--max-new-tokens", 2]


@pytest.fixture
def run(tmp_path, rounds):
    """A copy of a folder with the files of 01 to 04 and no adapter."""
    return shutil.copytree(rounds.sampled, tmp_path / "run")


# An edited reward, cut or stage.

def credited(run, monkeypatch, rewards):
    """04 with another prompt_rewards."""
    monkeypatch.setattr(advantage, "prompt_rewards", rewards)
    advantage.main(parsed("04_advantage.py", "--run", run))
    return load(run, "advantages")["prompts"]


@pytest.mark.parametrize("made", [
    [1.0, 0.0, 0.5, None], [1.0, 0.0, 0.5, float("nan")], [1.0, 0.0, 0.5, float("inf")], [1.0, 0.0, 0.5],
    [1.0, 0.0, 0.5, 0.5, 0.5], 0.5, None, torch.zeros(4, 2)],
    ids=["none", "nan", "inf", "too few", "too many", "a number", "nothing", "a matrix"])
def test_rewards_that_are_no_k_finite_numbers(run, monkeypatch, made):
    prompt = load(run, "rollouts")["prompts"][0]["id"]
    before = (run / "advantages.pt").read_bytes()
    with pytest.raises(sampling.UserError, match=f"{prompt} are not 4 finite numbers"):
        credited(run, monkeypatch, lambda rollout: made)
    assert (run / "advantages.pt").read_bytes() == before


@pytest.mark.parametrize("kind", [int, bool, numpy.float32, numpy.int64, torch.tensor])
def test_rewards_of_any_kind_of_number(run, monkeypatch, capsys, kind):
    """They count as their values: tensors are equal, and forks counted, as floats would be."""
    plain = credited(run, monkeypatch, lambda rollout: [1.0, 0.0, 1.0, 1.0])
    wanted = capsys.readouterr().out
    found = credited(run, monkeypatch, lambda rollout: [kind(value) for value in (1, 0, 1, 1)])
    assert capsys.readouterr().out == wanted
    for one, other in zip(plain, found):
        assert torch.equal(one["leaf"], other["leaf"]) and torch.equal(one["rewards"], other["rewards"])


def test_rewards_may_be_an_array(run, monkeypatch):
    found = credited(run, monkeypatch, lambda rollout: numpy.array([1.0, 0.0, 0.5, 0.5]))
    assert found[0]["rewards"].tolist() == [1.0, 0.0, 0.5, 0.5]


def test_a_bug_in_an_edited_reward_has_its_traceback(run, monkeypatch):
    with pytest.raises(NameError):
        credited(run, monkeypatch, lambda rollout: misspelt)  # noqa: F821


def test_negative_rewards_without_a_bound(run, monkeypatch):
    found = credited(run, monkeypatch, lambda rollout: [-3.0, -1.0, 0.0, -2.0])
    assert found[0]["rewards"].tolist() == [-3.0, -1.0, 0.0, -2.0] and found[0]["leaf"].isfinite().all()


def test_the_readmes_credit_of_rloo():
    """A node against the responses outside it: {0, 1, 2} of 0.6 against 0.2, then a tail each."""
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    [formula, K] = re.findall(r"RLOO compares .*?`(GA = .*?)`, with `(K = .*?)`", readme)[0]
    shipped = inspect.getsource(advantage.span_advantages)
    changed = shipped.replace("GA = value - root_value", f"{K}; {formula}")
    assert changed != shipped
    names = vars(advantage).copy()
    exec(changed, names)
    spans = names["span_advantages"]([2], [[[0, 1, 2]]], [4, 4, 4, 4], [1.0, 0.6, 0.2, 0.2],
                                     terms="global", multiplicity=0)
    credits = [credit for row in spans for _, _, credit in row]
    assert credits == pytest.approx([0.4, 2 / 3, 0.4, 0.4 / 3, 0.4, -0.4, -0.4])


def cut(run, monkeypatch, boundaries):
    """03 with another select_boundaries."""
    monkeypatch.setattr(tree, "select_boundaries", lambda surprisal, lengths, B: boundaries)
    tree.main(parsed("03_tree.py", "--run", run))
    return load(run, "tree")["prompts"][0]["boundaries"]


def test_boundaries_are_sorted_and_taken_once(run, monkeypatch):
    assert cut(run, monkeypatch, [3, 1, 3]) == [1, 3]


@pytest.mark.parametrize("boundaries", [[0, 2], [-1], [1.5], [torch.tensor(2)], ["2"], [None]])
def test_boundaries_that_are_no_integers_from_1(run, monkeypatch, boundaries):
    prompt = load(run, "rollouts")["prompts"][0]["id"]
    with pytest.raises(sampling.UserError, match=f"boundaries of {prompt}"):
        cut(run, monkeypatch, boundaries)


def test_a_value_that_cannot_be_read_back_is_refused_where_it_is_written(run):
    """In a fork of 04, say. The old file stays."""
    before = (run / "advantages.pt").read_bytes()
    stage = load(run, "advantages")
    stage["prompts"][0]["mine"] = numpy.float64(0.5)
    with pytest.raises(sampling.UserError, match="advantages.pt takes .*numpy") as error:
        sampling.save_stage(run, "advantages", stage["meta"], stage["prompts"])
    assert len(str(error.value)) < 450 and (run / "advantages.pt").read_bytes() == before


def test_a_dropped_prompt_is_called_that(run):
    stage = load(run, "advantages")
    sampling.save_stage(run, "advantages", stage["meta"], stage["prompts"][:-1])
    sentence = refusal("05_train.py", "--run", run)
    assert "advantages.pt" in sentence and "2 prompts" in sentence and "1 here" in sentence


def test_a_forgotten_stage_of_a_fork_is_refused(tmp_path, run):
    """Of a copy of what stays valid, rollouts and surprisal, as the README has it."""
    fork = tmp_path / "fork"
    fork.mkdir()
    for name in ("rollouts.pt", "surprisal.pt"):
        shutil.copy(run / name, fork)
    assert "run 04_advantage.py" in refusal("05_train.py", "--run", fork)
    call("03_tree.py", "--run", fork)
    assert "run 04_advantage.py" in refusal("05_train.py", "--run", fork)


# Manifests, models, folders.

def test_references_in_two_forms_of_unicode_are_the_same(tmp_path):
    """As macOS exports them; a column that 01 does not know stays as it is."""
    text = "Grüße, schöne Töne"
    rows = [{"audio": "a.wav", "prompt": text, "reference": unicodedata.normalize(form, text),
             "other": unicodedata.normalize("NFD", text)} for form in ("NFC", "NFD")]
    path = tmp_path / "manifest.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    first, second = sampling.read_manifest(path)
    assert first["reference"] == second["reference"] == text and second["other"] != text
    assert advantage.sentence_bleu(text, second["reference"]) == 1


def test_a_file_name_keeps_its_form_of_unicode(tmp_path):
    name = unicodedata.normalize("NFD", "Grüße.wav")
    path = tmp_path / "manifest.jsonl"
    path.write_text(json.dumps({"audio": name, "prompt": "a", "reference": "b"}), encoding="utf-8")
    assert Path(sampling.read_manifest(path)[0]["audio"]).name == name


def test_more_positions_than_the_model_has(demo, prompt_embeds, monkeypatch):
    """Refused before anything is sampled; at the limit it is not."""
    model, _ = demo
    P = max(len(embeds) for embeds in prompt_embeds)
    monkeypatch.setattr(model.config.get_text_config(), "max_position_embeddings", P + 4)
    assert len(sampling.sample_all(model, prompt_embeds, 4, 1, 4, 0, 1.0)) == len(prompt_embeds)
    monkeypatch.setattr(sampling, "sample_responses", lambda *given: pytest.fail("too late"))
    with pytest.raises(sampling.UserError, match=f"a prompt of {P} .*--max-new-tokens 5 .*{P + 4}"):
        sampling.sample_all(model, prompt_embeds, 4, 1, 5, 0, 1.0)


def test_an_adapter_as_a_model(rounds):
    with pytest.raises(sampling.UserError, match="is an adapter: merge it"):
        sampling.load_model(str(rounds.trained / "adapter"))


def test_an_adapter_of_ones_own_as_that_of_a_run(tmp_path, rounds):
    run = shutil.copytree(rounds.trained, tmp_path / "run")
    (run / "adapter" / "training.json").unlink()
    assert "merge" in refusal("01_sample.py", "--run", run, *SMALL)


def test_an_adapter_that_is_a_link_is_refused_before_training(tmp_path, rounds, monkeypatch):
    run = shutil.copytree(rounds.ready, tmp_path / "run")
    shutil.move(run / "adapter", tmp_path / "disk")
    (run / "adapter").symlink_to(tmp_path / "disk")
    monkeypatch.setattr(sampling, "load_model", lambda *args, **named: pytest.fail("too late"))
    assert "is a link" in refusal("05_train.py", "--run", run)


def test_a_run_that_is_a_link_is_trained(tmp_path, rounds):
    shutil.copytree(rounds.sampled, tmp_path / "disk")
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    call("05_train.py", "--run", tmp_path / "run")
    assert (tmp_path / "disk" / "adapter" / "training.json").exists()


def test_a_model_by_its_relative_and_its_absolute_path(tmp_path, rounds):
    run = shutil.copytree(rounds.trained, tmp_path / "run")
    call("01_sample.py", "--run", run, *SMALL, "--model", os.path.relpath(MODEL))
    assert load(run, "rollouts")["meta"]["round"] == 2


def test_from_another_folder(tmp_path, monkeypatch):
    """The sentence says where to run it, and no empty runs/ is left behind."""
    monkeypatch.chdir(tmp_path)
    for script in ("01_sample.py", "02_surprisal.py"):
        sentence = refusal(script)
        assert "folder" in sentence and "01_sample.py" in sentence
    assert not list(tmp_path.iterdir())


def test_a_manifest_whose_name_is_misspelt(tmp_path):
    sentence = refusal("01_sample.py", "--run", tmp_path / "run", "--manifest", tmp_path / "trian.jsonl")
    assert "trian.jsonl" in sentence and not list(tmp_path.iterdir())


def test_paths_with_bytes_that_are_no_text_cost_no_answers(tmp_path, rounds):
    """06 has answered for minutes when it writes them."""
    run = shutil.copytree(rounds.trained, tmp_path / "run")
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    folder.mkdir()
    example = {**sampling.read_manifest(TEST)[0]}
    example["audio"] = str(Path(example["audio"]).resolve())
    (folder / "test.jsonl").write_text(json.dumps(example))
    call("06_eval.py", "--run", run, *EVALUATION, "--manifest", folder / "test.jsonl")
    assert b"caf\xe9" in (run / "eval.csv").read_bytes()
    assert len((run / "predictions.jsonl").read_text().splitlines()) == 1


def test_columns_of_a_manifest_reach_the_reward(tmp_path, monkeypatch):
    """Several references, say."""
    example = {**sampling.read_manifest(TRAIN)[0], "references": ["Ja.", "Nein."], "category": 3}
    example["audio"] = str(Path(example["audio"]).resolve())
    (tmp_path / "manifest.jsonl").write_text(json.dumps(example))
    run = tmp_path / "run"
    call("01_sample.py", "--run", run, *SMALL, "--manifest", tmp_path / "manifest.jsonl")
    for script in ("02_surprisal.py", "03_tree.py"):
        call(script, "--run", run)
    seen = []
    credited(run, monkeypatch, lambda rollout: seen.append(
        (rollout["references"], rollout["category"])) or [0.0, 1.0, 0.5, 0.5])
    assert seen == [(["Ja.", "Nein."], 3)]
