"""What 01 to 04 and 06 do with the second prompt, the second round, or a flag: where one example would
not have shown a mistake."""
import json
import re
import shutil
from importlib import import_module

import pytest
import soundfile
import torch
from conftest import MODEL, SMALL, call, load, parsed

sampling = import_module("01_sample")
scoring = import_module("02_surprisal")
advantage = import_module("04_advantage")
evaluation = import_module("06_eval")


# 01.

@pytest.fixture
def clips(tmp_path):
    """Writes clips of so many seconds of noise; their examples, as read_manifest returns them."""
    def write(*seconds):
        examples = []
        for number, length in enumerate(seconds):
            path = tmp_path / f"{number}.wav"
            noise = torch.rand(int(length * 16000), generator=torch.Generator().manual_seed(number)) - 0.5
            soundfile.write(path, noise.numpy() / 5, 16000)
            examples.append({"id": str(number), "audio": str(path), "prompt": "Translate.", "reference": "Ja."})
        return examples
    return write


def embed(demo, examples, *options):
    return sampling.embed_examples(*demo, examples, parsed("01_sample.py", *options))


@pytest.mark.parametrize("seconds", [(2, 9), (2, 5, 9), (7.9, 8.3), (9, 2)])
def test_a_clip_beyond_what_the_model_hears_is_refused_wherever_it_stands(demo, clips, seconds):
    """The demo's model hears 8 s, and its feature extractor cuts the rest off in silence."""
    number, longest = max(enumerate(seconds), key=lambda item: item[1])
    with pytest.raises(sampling.UserError, match=rf"{number}\.wav lasts {longest:.2f} s, .* hears 8 s"):
        embed(demo, clips(*seconds))


def test_each_clip_that_is_too_long_is_left_out(demo, clips, capsys):
    """Also after a longer one: what was left out says nothing of the others."""
    examples, embeds = embed(demo, clips(2, 9.5, 8.5, 3, 9), "--skip-unreadable")
    assert [example["id"] for example in examples] == ["0", "3"] and len(embeds) == 2
    assert capsys.readouterr().err.count("left out: ") == 3


@pytest.mark.parametrize("options, settings", [
    (["--system-prompt", "Answer in German."], ("Answer in German.", False)), (["--raw-prompt"], ("", True))])
def test_every_prompt_is_rendered_with_the_options(demo, clips, options, settings):
    model, processor = demo
    examples, embeds = embed(demo, clips(2, 3), *options)
    for example, found in zip(examples, embeds, strict=True):
        text = sampling.render_prompt(processor, example["prompt"], *settings)
        wave = sampling.load_audio(example["audio"], 16000)
        assert torch.equal(found, sampling.embed_prompt(model, processor, wave, text))


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("per_batch", [1, 3])
def test_responses_stay_with_their_prompts(demo, prompt_embeds, per_batch, descending):
    """Prompts of like length share a batch, in whatever order they come."""
    embeds = sorted(prompt_embeds, key=len, reverse=descending)
    together = sampling.sample_all(demo[0], embeds, per_batch, 1, 14, 0, 1.0)
    for prompt, (responses, lengths) in zip(embeds, together, strict=True):
        [(alone, length)] = sampling.sample_responses(demo[0], [prompt], 1, 14, 0, 1.0)
        assert torch.equal(responses, alone) and torch.equal(lengths, length)


def test_each_round_has_draws_of_its_own(tmp_path, rounds):
    """Of the same policy, for the same prompts."""
    drawn = []
    for number in (1, 1, 2):
        run = shutil.copytree(rounds.trained, tmp_path / str(len(drawn)))
        state = json.loads((run / "adapter" / "training.json").read_text())
        (run / "adapter" / "training.json").write_text(json.dumps({**state, "round": number}))
        call("01_sample.py", "--run", run, *SMALL)
        drawn.append([rollout["responses"].tolist() for rollout in load(run, "rollouts")["prompts"]])
    assert drawn[0] == drawn[1] != drawn[2]


# 02.

def test_02_scores_with_the_adapter_and_without(rounds):
    rollouts = load(rounds.ready, "rollouts")["prompts"]
    by_adapter = []
    for adapter in (rounds.ready / "adapter", None):
        model, _ = sampling.load_model(str(MODEL), adapter)
        with torch.inference_mode():
            by_adapter.append(scoring.score_responses(model, rollouts))
    for old, ref, score in zip(*by_adapter, load(rounds.ready, "surprisal")["prompts"], strict=True):
        assert (old - ref).abs().max() > 1e-3
        torch.testing.assert_close(score["logp_old"], old, atol=1e-5, rtol=0)
        torch.testing.assert_close(score["logp_ref"], ref, atol=1e-5, rtol=0)
        assert torch.equal(score["surprisal"], -score["logp_old"])


def test_the_mean_surprisal_is_that_of_the_tokens(handmade, prompt_embeds, capsys):
    """Padding, whose surprisal is 0, is not counted; a long response counts more than a short one."""
    rollouts = load(handmade, "rollouts")
    prompts = [{**prompt, "embeds": prompt_embeds[0]} for prompt in rollouts["prompts"]]
    sampling.save_stage(handmade, "rollouts", rollouts["meta"], prompts)
    call("02_surprisal.py", "--run", handmade)
    tokens, mean = re.search(r"(\d+) tokens, mean surprisal ([\d.]+) nats", capsys.readouterr().out).groups()
    surprisals = []
    for prompt, score in zip(prompts, load(handmade, "surprisal")["prompts"]):
        for row, length in zip(score["surprisal"].tolist(), prompt["lengths"].tolist()):
            surprisals += row[:length]
    assert int(tokens) == len(surprisals)
    assert float(mean) == pytest.approx(sum(surprisals) / len(surprisals), abs=0.0051)


def test_the_trie_is_checked_on_the_responses_that_differ_most(handmade, monkeypatch):
    """Where all are alike there are no branches that could see each other."""
    checked = []
    monkeypatch.setattr(scoring, "check_trie", lambda model, rollout: checked.append(rollout["id"]))
    monkeypatch.setattr(scoring, "score_responses", lambda model, batch: [
        torch.zeros(rollout["responses"].shape) for rollout in batch])
    rollouts = load(handmade, "rollouts")
    sampling.save_stage(handmade, "rollouts", rollouts["meta"], rollouts["prompts"][::-1])
    scoring.main(parsed("02_surprisal.py", "--run", handmade))
    assert checked == ["made-0"]  # the last one: four different responses


def test_02_draws_a_character_per_token(handmade, monkeypatch, capsys):
    nats = torch.tensor([0.05, 0.3, 0.7, 2.0, 0.0, 1.4, 1.6])
    monkeypatch.setattr(scoring, "check_trie", lambda model, rollout: None)
    monkeypatch.setattr(scoring, "score_responses", lambda model, batch: [
        -nats[:rollout["responses"].shape[1]] * scoring.response_mask(rollout) for rollout in batch])
    scoring.main(parsed("02_surprisal.py", "--run", handmade))
    drawn = [line.split()[0] for line in capsys.readouterr().out.splitlines()[-4:]]
    assert drawn == [".-+#.+#"[:length] for length in load(handmade, "rollouts")["prompts"][0]["lengths"]]


# 03 and 04.

@pytest.mark.parametrize("terms, multiplicity", [("both", 0), ("local", 0.5), ("global", 1), ("local", 0)])
def test_the_flags_of_04_reach_the_credits(handmade, terms, multiplicity):
    call("03_tree.py", "--run", handmade)
    call("04_advantage.py", "--run", handmade, "--advantage-terms", terms, "--multiplicity", multiplicity)
    prompts = zip(*(load(handmade, name)["prompts"] for name in ("rollouts", "tree", "advantages")))
    for number, (rollout, tree, earned) in enumerate(prompts):
        tree = (tree["boundaries"], tree["groups"], rollout["lengths"], advantage.prompt_rewards(rollout))
        spans = advantage.span_advantages(*tree, terms, multiplicity)
        assert earned["spans"] == [[list(span) for span in row] for row in spans]
        assert number > 0 or spans != advantage.span_advantages(*tree)


@pytest.mark.parametrize("number", range(3))
def test_03_and_04_draw_the_same_tree(handmade, capsys, number):
    drawn = []
    for script in ("03_tree.py", "04_advantage.py"):
        call(script, "--run", handmade, "--show", number)
        lines = capsys.readouterr().out.splitlines()
        drawn.append([line[:58] for line in lines if re.match("[ │]*[├└]─ ", line)])
    assert drawn[0] == drawn[1] and len(drawn[0]) > 3


def test_the_reward_minds_case():
    """The scores of 06 do not."""
    texts = ["Sie haben nur zwei neue Nachrichten.", "sie haben nur zwei neue nachrichten."]
    same, lower = advantage.prompt_rewards({"texts": texts, "reference": texts[0]})
    assert same == 1 and 0 < lower < 0.9


# 06.

def test_an_exact_match_is_of_the_words_with_case_and_punctuation():
    greedy = ["Guten  Tag. ", "guten Tag.", "Guten Tag", "Guten Tag."]
    found = evaluation.scores([[text] for text in greedy], greedy, ["Guten Tag.\n"] * 4)
    assert found["exact_match"] == "50.0"
