"""make_real.py: the parts put together, what is trained of them, and what is shipped of that."""
import doctest
import json
import os
import random
import sys
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from conftest import DEMO, ROOT, call, load
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, WhisperConfig,
                          WhisperFeatureExtractor, WhisperModel)

sys.path.insert(0, str(DEMO))
import make_demo
import make_real

sampling = make_real.sampling
advantage = import_module("04_advantage")
REAL = DEMO / "real"
SENTENCES = ["you have five new messages", "you have twelve old messages",
             "this message lasts ten minutes", "incoming call from four two"]
QUESTIONS = {"What is it?": ("A message.", "It is a message.", "Something to hear.")}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A Whisper and a Llama with random weights and a tokenizer of bytes, as folders."""
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    WhisperModel(WhisperConfig(
        d_model=32, encoder_layers=2, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64)
        ).save_pretrained(folder / "whisper")
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: i for i, token in enumerate(special + sorted(alphabet))}
    text = Tokenizer(models.BPE(vocabulary, []))
    text.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    text.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=text, bos_token="<|im_start|>", eos_token="<|im_end|>",
                            pad_token="<|im_end|>").save_pretrained(folder / "llama")
    LlamaForCausalLM(LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=48, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, eos_token_id=2, pad_token_id=2,
        tie_word_embeddings=True, initializer_range=0.3)).save_pretrained(folder / "llama")
    return str(folder / "whisper"), str(folder / "llama")


def clips_of(count, seed=0):
    """Announcements as make_demo.draw_example gives them, but of noise."""
    torch.manual_seed(seed)
    return [{"sentence": SENTENCES[i % 4], "questions": QUESTIONS,
             "samples": 0.1 * torch.randn(8000 + 4000 * (i % 5))} for i in range(count)]


def test_docstring_examples():
    assert doctest.testmod(make_real).failed == 0


# The task.

def test_every_announcement_has_a_reference_among_many_answers():
    rng = random.Random(0)
    for pattern, about, to_do in make_real.ANNOUNCEMENTS:
        sentence = pattern.replace("(.*)", "twenty five").replace("(?:waiting|thank)", "thank")
        sentence = sentence.replace(".*", "you")
        reference = make_real.write_answer(sentence)
        assert all(part in reference for part in (sentence, about, to_do.format("twenty five")))
        answers = {make_real.write_answer(sentence, rng) for _ in range(1000)}
        assert reference in answers and len(answers) == 108
        assert {answer.count("25") for answer in answers} == {0, 1, 2}


def test_numbers_in_digits_keep_their_places():
    assert make_real.in_digits("seventeen seven seventy seventy seven oh") == "17 7 70 77 oh"
    assert make_real.in_digits("seven seven one") == "7 7 1"
    assert make_real.in_digits("someone is phoning at one") == "someone is phoning at 1"


# The parts.

def test_the_assembled_model_computes_as_its_parts_do(parts):
    model, processor = make_real.assemble(*parts, seconds=30)  # Whisper's own length
    whisper = WhisperModel.from_pretrained(parts[0]).encoder.eval()
    llama = LlamaForCausalLM.from_pretrained(parts[1]).eval()
    features = WhisperFeatureExtractor()(torch.randn(16000).numpy(), sampling_rate=16000,
                                         return_tensors="pt").input_features
    outputs = []
    hooks = [layers[-1].register_forward_hook(lambda module, inputs, output: outputs.append(
        output[0] if isinstance(output, tuple) else output))
        for layers in (whisper.layers, model.model.audio_tower.layers)]
    with torch.no_grad():
        whisper(features)
        model.model.audio_tower(features)
        ids = torch.tensor([[5, 60, 7, 100]])
        ours, theirs = model(input_ids=ids).logits, llama(input_ids=ids).logits
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(outputs[0], outputs[1])
    torch.testing.assert_close(ours[..., :theirs.shape[-1]], theirs)
    assert len(processor.tokenizer) == theirs.shape[-1] + 3 == ours.shape[-1]
    assert not any(weight.requires_grad for weight in model.parameters())


def test_encoded_clips_are_what_01_gives_the_language_model(parts):
    model, processor = make_real.assemble(*parts)
    clips = clips_of(5)
    waves = [clip["samples"] for clip in clips]
    make_real.encode_clips(model, processor, clips, batch_size=2)
    text = sampling.render_prompt(processor, make_real.PROMPT)
    audio = processor.tokenizer.convert_tokens_to_ids(processor.audio_token)
    for wave, clip in zip(waves, clips):
        embeds = sampling.embed_prompt(model, processor, wave, text)
        ids = processor(text=text, audio=wave.numpy(), return_tensors="pt").input_ids[0]
        speech = model.model.multi_modal_projector(clip["states"].float())
        torch.testing.assert_close(embeds[ids == audio], speech, atol=2e-3, rtol=1e-2)  # float16
        assert abs(len(speech) - len(wave) / 640) < 1  # 25 a second
    assert len(clips) == 5 and "samples" not in clips[0]


def test_without_a_hub_one_sentence_says_what_to_do(tmp_path, monkeypatch):
    """conftest.py sets HF_HUB_OFFLINE; the part that is asked for is in no cache."""
    monkeypatch.setattr(sys, "argv", ["make_real.py", "--encoder", "nobody/has-this",
                                      "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stop:
        make_real.main()
    sentence = stop.value.code
    assert isinstance(sentence, str) and len(sentence.splitlines()) == 1
    assert "nobody/has-this" in sentence and "--encoder" in sentence
    assert not (tmp_path / "out").exists()


# What is learned.

def test_the_size_of_the_embeddings_plays_no_part():
    """Or the distances of one model would be too sharp to learn from, those of another too flat."""
    frames, table = torch.randn(50, 8), torch.randn(5, 6)
    small, large = (make_real.Listener(frames, scale * table)(frames) for scale in (1, 10))
    torch.testing.assert_close(small, large)


def test_the_projector_learns_words(parts, capsys):
    """Clips that are a random linear picture of their tokens: in the end no word is wrong."""
    model, processor = make_real.assemble(*parts)
    table = model.get_input_embeddings().weight
    torch.manual_seed(1)
    picture = 10 * torch.randn(table.shape[1], 32)
    clips = []
    for n in range(96):
        words = random.Random(n).sample("one two three four five six".split(), 3)
        ids = torch.tensor(processor.tokenizer(" " + " ".join(words)).input_ids)
        frames = torch.stack([ids, ids, torch.full_like(ids, 198)]).T.flatten()  # with pauses
        clips.append({"sentence": " ".join(words),
                      "states": (table[frames] @ picture).half()})
    make_real.learn_words(model, processor.tokenizer, clips[:80], clips[80:], epochs=24,
                          learning_rate=1e-2)
    lines = capsys.readouterr().out.splitlines()
    wrong = [float(line.split()[-7].strip("%")) for line in lines]
    assert len(wrong) == 6 and wrong[-1] == 0, lines
    speech = model.model.multi_modal_projector(clips[0]["states"].float())
    lengths = speech.norm(dim=1).mean(), table.norm(dim=1).mean()
    assert 0.5 < lengths[0] / lengths[1] < 2


@pytest.fixture(scope="module")
def learned(parts, tmp_path_factory):
    """Forty steps of answering: the PEFT model, and that of a training stopped and resumed."""
    folder = tmp_path_factory.mktemp("learned")
    args = SimpleNamespace(lora_rank=2, learning_rate=5e-3, steps=40, batch_size=2, seed=0)

    def learn(path, last_step=None):
        torch.manual_seed(0)
        model, processor = make_real.assemble(*parts)
        clips = clips_of(6)
        make_real.encode_clips(model, processor, clips)
        answer_loss, losses = make_real.answer_loss, []

        def interrupted(*inputs):
            if len(losses) == last_step:
                raise KeyboardInterrupt
            losses.append(answer_loss(*inputs))
            return losses[-1]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(make_real, "answer_loss", interrupted)
            return make_real.learn_answers(model, processor, clips, args, path), processor, clips

    straight, processor, clips = learn(folder / "straight.pt")
    with pytest.raises(KeyboardInterrupt):
        learn(folder / "resumed.pt", last_step=27)  # 20 steps are in the file
    resumed, *_ = learn(folder / "resumed.pt", last_step=20)
    return (straight, resumed), processor, clips


def test_a_resumed_training_is_the_same(learned):
    (straight, resumed), _, _ = learned
    weights = dict(resumed.named_parameters())
    trained = [name for name, weight in straight.named_parameters() if weight.requires_grad]
    assert len(trained) == 2 * 7 * 2 + 2  # A and B of seven layers in two blocks, and the projector
    for name, weight in straight.named_parameters():
        assert torch.equal(weight, weights[name]), name


def test_the_loss_is_that_of_the_models_own_forward(parts, monkeypatch):
    """Two clips of different lengths and answers, of which the answers' tokens alone count."""
    model, processor = make_real.assemble(*parts)
    tasks = {"you have five new messages": ("How many?", "Five, I think."),
             "you have twelve old messages": ("What is it about?", "No.")}
    monkeypatch.setattr(make_real, "draw_task", lambda clip, rng: tasks[clip["sentence"]])
    clips = clips_of(2)
    logps = []
    for clip in clips:
        prompt, answer = tasks[clip["sentence"]]
        text = sampling.render_prompt(processor, prompt) + answer + processor.tokenizer.eos_token
        inputs = processor(text=text, audio=clip["samples"].numpy(), return_tensors="pt")
        count = len(answer) + 1  # a token per byte, and the end
        with torch.no_grad():
            logits = model(**inputs).logits[0, -count - 1:-1].log_softmax(dim=-1)
        logps.append(logits.gather(1, inputs["input_ids"][0, -count:, None]))
    make_real.encode_clips(model, processor, clips)
    loss = make_real.answer_loss(model, processor, clips, None)
    torch.testing.assert_close(loss, -torch.cat(logps).mean(), atol=5e-3, rtol=1e-3)


def test_answers_are_learned(learned, parts):
    (model, _), processor, clips = learned
    before, _ = make_real.assemble(*parts)
    with torch.no_grad():
        losses = [make_real.answer_loss(each, processor, clips, random.Random(5)).item()
                  for each in (before, model.base_model.model)]
    assert losses[1] < losses[0] - 1


def test_the_folded_model_runs_through_the_stages(learned, parts, tmp_path):
    (model, _), processor, clips = learned
    make_real.save_trained(model, tmp_path / "trained")
    assert {path.name for path in (tmp_path / "trained").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors"}
    torch.manual_seed(7)  # another random projector, to be replaced by the trained one
    folded = make_real.fold(make_real.assemble(*parts)[0], tmp_path / "trained")
    with torch.no_grad():
        losses = [make_real.answer_loss(each, processor, clips, random.Random(5)).item()
                  for each in (model.base_model.model.float(), folded)]
    assert abs(losses[0] - losses[1]) < 1e-3
    folded.half().save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    call("01_sample.py", "--run", tmp_path / "run", "--model", tmp_path / "model",
         "--manifest", REAL / "train.jsonl", "--num-prompts", 2, "--num-responses", 3,
         "--max-new-tokens", 6)
    call("02_surprisal.py", "--run", tmp_path / "run")
    assert load(tmp_path / "run", "surprisal")["prompts"][0]["surprisal"].isfinite().all()


# What is shipped.

def test_the_shipped_manifests_are_of_the_demos_clips():
    for split, count in (("train", 256), ("test", 128)):
        clips = [example["audio"] for example in sampling.read_manifest(DEMO / f"{split}.jsonl")]
        for name in (split, f"{split}_questions"):
            examples = sampling.read_manifest(REAL / f"{name}.jsonl")
            assert [os.path.normpath(example["audio"]) for example in examples] == clips
            assert len(examples) == count
        assert len({example["prompt"] for example in examples}) > 10


def test_the_shipped_references_tell_what_the_clips_say():
    """The questions' answers come from make_demo.py, the others from write_answer: the numbers that
    one says are in the other."""
    numbers = {make_demo.english(n).replace("-", " ") for n in range(10, 100)}
    for split in ("train", "test"):
        pairs = zip(sampling.read_manifest(REAL / f"{split}.jsonl"),
                    sampling.read_manifest(DEMO / f"{split}.jsonl"))
        for real, demo in pairs:
            said = real["reference"].removeprefix("The announcement says: ").split(". ")[0]
            assert make_real.write_answer(said) == real["reference"]
            if not demo["prompt"].startswith("Translate"):
                answer = demo["reference"].replace("-", " ")
                assert all(number in said for number in numbers if f" {number} " in answer)


def test_no_test_sentence_is_in_the_training():
    train, test = ({example["reference"] for example in sampling.read_manifest(REAL / name)}
                   for name in ("train.jsonl", "test.jsonl"))
    assert len(train) > 250 and len(test) == 128 and not train & test


def test_the_shipped_weights_are_small_and_fit_the_parts():
    path = REAL / "adapter_model.safetensors"
    assert path.stat().st_size < 6e6
    from safetensors.torch import load_file
    weights = load_file(path)
    assert all(weight.dtype == torch.float16 and weight.isfinite().all()
               for weight in weights.values())
    projector = {name.split(".")[-1]: weight.shape for name, weight in weights.items()
                 if "multi_modal_projector" in name}
    assert projector == {"weight": (576, 512), "bias": (576,)}
    assert sum("lora_B" in name for name in weights) == 30 * 7
    config = json.loads((REAL / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] is None  # no path of the machine that trained it


@pytest.mark.skipif(not (ROOT / "runs/real-model").exists(),
                    reason="needs runs/real-model: tests/demo/make_real.py")
def test_the_real_model_hears(tmp_path):
    call("01_sample.py", "--run", tmp_path, "--model", ROOT / "runs/real-model", "--manifest",
         REAL / "test.jsonl", "--num-prompts", 2, "--num-responses", 1, "--temperature", 0)
    rewards = [reward for prompt in load(tmp_path, "rollouts")["prompts"]
               for reward in advantage.prompt_rewards(prompt)]
    assert sum(rewards) / len(rewards) > 0.25
