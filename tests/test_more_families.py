"""More families in small, by their own classes: random checkpoints whose weights are large enough
that mistakes show, held against each family's own forward. What a right model is not is refused."""
import shutil
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import MODEL, SMALL, call, load, sampled_round
from peft import PeftModel

sampling = import_module("01_sample")
scoring = import_module("02_surprisal")
training = import_module("05_train")

TEXT = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 544, "max_position_embeddings": 4096}
OMNI_AUDIO = {"d_model": 64, "encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 64,
              "output_dim": 64, "num_mel_bins": 128}
OMNI_VISION = {"depth": 1, "hidden_size": 64, "intermediate_size": 64, "num_heads": 4,
               "out_hidden_size": 64}
ROPE = {"type": "default", "rope_type": "default", "mrope_section": [2, 3, 3]}
RESPONSES = torch.tensor([[5, 6, 7], [5, 8, 6], [9, 5, 6]])
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
ALL = ATTENTION | {"gate_proj", "up_proj", "down_proj"}
TEMPLATE = "{% for message in messages %}{{ message.content }}\n{% endfor %}answer:"


def random_weights(model):
    torch.manual_seed(0)
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=1.5 / weight.shape[-1] ** 0.5 if weight.dim() == 2 else 0.1)
    model.generation_config.eos_token_id = [2, 7]
    return model.eval()


def tokenizer_with(*tokens):
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
    tokenizer.chat_template = TEMPLATE
    return tokenizer, tokenizer.convert_tokens_to_ids(list(tokens))


# Families whose processors need no more than the six packages: all stages.

def flamingo(name):
    tokenizer, ids = tokenizer_with("<sound>", "<|sound_bos|>", "<|sound_eos|>")
    audio = {"model_type": "audioflamingo3_encoder", "num_hidden_layers": 2, "num_attention_heads": 4,
             "hidden_size": 64, "intermediate_size": 96, "num_mel_bins": 128}
    more = {"audio_bos_token_id": ids[1], "audio_eos_token_id": ids[2]} if "Music" in name else {}
    config = getattr(transformers, f"{name}Config")(
        audio_config=audio, text_config={"model_type": "qwen2", **TEXT}, audio_token_id=ids[0], **more)
    return config, tokenizer


def glm_asr(name):
    tokenizer, ids = tokenizer_with("<|pad|>")
    audio = {"model_type": "glmasr_encoder", "num_hidden_layers": 2, "num_attention_heads": 4,
             "hidden_size": 64, "intermediate_size": 256}
    config = transformers.GlmAsrConfig(
        audio_config=audio, text_config={"model_type": "llama", "head_dim": 16, **TEXT}, audio_token_id=ids[0])
    return config, tokenizer


HEARING = {"AudioFlamingo3": flamingo, "MusicFlamingo": flamingo, "GlmAsr": glm_asr}


@pytest.fixture(scope="module", params=HEARING)
def hearing(request, tmp_path_factory):
    """(the published class, folder of a checkpoint with its own processor)."""
    folder = tmp_path_factory.mktemp(request.param)
    config, tokenizer = HEARING[request.param](request.param)
    published = getattr(transformers, f"{request.param}ForConditionalGeneration")
    random_weights(published(config)).save_pretrained(folder)
    features = transformers.WhisperFeatureExtractor(feature_size=128)
    getattr(transformers, f"{request.param}Processor")(features, tokenizer).save_pretrained(folder)
    return published, folder


def own_logps(model, processor, rollout):
    """(K, T) by the model's own forward, a response at a time after the clip and its prompt."""
    wave = sampling.load_audio(rollout["audio"], 16000)
    inputs = sampling.encode(model, processor, wave, sampling.render_prompt(processor, rollout["prompt"]))
    logps = torch.zeros(rollout["responses"].shape)
    for k, length in enumerate(rollout["lengths"].tolist()):
        response = rollout["responses"][k:k + 1, :length]
        ids = torch.cat([inputs["input_ids"], response], dim=1)
        whole = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        logits = model(**whole).logits[0, -length - 1:-1].log_softmax(dim=-1)
        logps[k, :length] = logits.gather(1, response[0, :, None])[:, 0]
    return logps


def test_all_stages_agree_with_the_familys_own_forward(tmp_path, hearing):
    """Sampled after a round of training: policy and reference through plain PEFT."""
    published, folder = hearing
    options = ["--model", folder, "--max-new-tokens", 5]
    sampled_round(tmp_path, *options)
    call("05_train.py", "--run", tmp_path, "--learning-rate", 0.01)
    call("01_sample.py", "--run", tmp_path, *SMALL, *options)
    call("02_surprisal.py", "--run", tmp_path)
    processor = transformers.AutoProcessor.from_pretrained(folder)
    reference = published.from_pretrained(folder, dtype=torch.float32).eval()
    found = load(tmp_path, "surprisal")["prompts"]
    with torch.no_grad():
        refs = [own_logps(reference, processor, rollout) for rollout in load(tmp_path, "rollouts")["prompts"]]
        policy = PeftModel.from_pretrained(reference, tmp_path / "adapter").eval()
        olds = [own_logps(policy, processor, rollout) for rollout in load(tmp_path, "rollouts")["prompts"]]
    for score, old, ref in zip(found, olds, refs):
        torch.testing.assert_close(score["logp_old"], old, atol=1e-3, rtol=0)
        torch.testing.assert_close(score["logp_ref"], ref, atol=1e-3, rtol=0)
        assert (old - ref).abs().max() > 0.01


# Families whose processors need more: their language model.

def qwen25_omni():
    text = {**TEXT, "rope_scaling": ROPE}
    return transformers.Qwen2_5OmniForConditionalGeneration(transformers.Qwen2_5OmniConfig(
        enable_audio_output=False,
        thinker_config={"audio_config": OMNI_AUDIO, "vision_config": OMNI_VISION, "text_config": text}))


def qwen3_omni():
    text = {**TEXT, "rope_scaling": ROPE, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2,
            "moe_intermediate_size": 32}
    audio = {**OMNI_AUDIO, "downsample_hidden_size": 16}
    vision = {**OMNI_VISION, "deepstack_visual_indexes": [0]}
    return transformers.Qwen3OmniMoeForConditionalGeneration(transformers.Qwen3OmniMoeConfig(
        enable_audio_output=False,
        thinker_config={"audio_config": audio, "vision_config": vision, "text_config": text}))


def phi4():
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "crop_size": 28, "patch_size": 14}
    audio = {"hidden_size": 32, "intermediate_size": 32, "num_blocks": 1, "num_attention_heads": 2,
             "ext_pw_out_channel": 32, "nemo_conv_channels": 32, "input_size": 80}
    return transformers.Phi4MultimodalForCausalLM(transformers.Phi4MultimodalConfig(
        **TEXT, pad_token_id=0, bos_token_id=1, eos_token_id=2, vision_config=vision, audio_config=audio))


def gemma4(window=512):
    text = {**TEXT, "head_dim": 16, "global_head_dim": 16, "final_logit_softcapping": 5.0,
            "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "sliding_window": window,
            "vocab_size_per_layer_input": 544, "layer_types": ["sliding_attention", "full_attention"]}
    return transformers.Gemma4ForConditionalGeneration(transformers.Gemma4Config(
        text_config=text, vision_config=None, audio_config=None, image_token_id=540, audio_token_id=541,
        video_token_id=542))


def loaded(model, folder):
    """As 02 and 05 load it; with the file of voices that a published Qwen2.5-Omni brings."""
    random_weights(model).save_pretrained(folder)
    torch.save({}, folder / "spk_dict.pt")
    return sampling.load_model(str(folder), audio=False)[0]


def embeds_for(model, P=11):
    width = model.get_input_embeddings().weight.shape[1]
    return torch.randn(P, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("build, layers", [
    (qwen25_omni, ALL), (qwen3_omni, ATTENTION), (gemma4, ALL),
    (phi4, {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"})])
def test_the_language_model_agrees_with_its_own_forward(tmp_path, build, layers):
    model = loaded(build(), tmp_path)
    embeds = embeds_for(model)
    trie = scoring.build_trie(RESPONSES, torch.tensor([3, 3, 3]))
    with torch.no_grad():
        found = scoring.batch_logps(model, [embeds], [trie])[0][trie.node]
        for response, logps in zip(RESPONSES, found):
            inputs = torch.cat([embeds, model.get_input_embeddings()(response)])
            logits = model(inputs_embeds=inputs[None]).logits[0, -4:-1].float().log_softmax(dim=-1)
            torch.testing.assert_close(logps, logits.gather(1, response[:, None])[:, 0], atol=1e-3, rtol=0)
    scoring.check_model(model, embeds)
    [(responses, lengths)] = sampling.sample_responses(model, [embeds], 3, 6, 1.0, 0.9)
    sampled = scoring.build_trie(responses, lengths)
    [(greedy, _)] = sampling.sample_responses(model, [embeds], 1, 6, 0, 0.9)
    with torch.no_grad():
        assert scoring.batch_logps(model, [embeds], [sampled])[0].isfinite().all()
        inputs = embeds
        for token in greedy[0]:  # the cache of 01 agrees with the whole sequence, token by token
            assert model(inputs_embeds=inputs[None]).logits[0, -1].argmax() == token
            inputs = torch.cat([inputs, model.get_input_embeddings()(token[None])])
    adapted = training.add_lora(model, 4, 8, 0.0)
    names = {name.split(".lora_")[0] for name, _ in adapted.named_parameters() if "lora_" in name}
    assert {name.split(".")[-1] for name in names} == layers
    inside = set(adapted.get_decoder().layers.modules())
    assert all(adapted.get_submodule(name) in inside for name in names)


# What is refused.

def test_a_window_that_prompt_and_responses_exceed(tmp_path):
    model = loaded(gemma4(window=16), tmp_path)
    window = model.config.get_text_config().sliding_window
    with pytest.raises(sampling.UserError, match=f"window of {window}"):
        sampling.sample_responses(model, [embeds_for(model)], 2, window, 1.0, 0.9)


def test_a_decoder_that_takes_more_than_embeddings(demo, examples):
    """As Gemma 3n does: then the embeddings alone give other log-probabilities."""
    model, processor = demo
    wave = sampling.load_audio(examples[0]["audio"], 16000)
    text = sampling.render_prompt(processor, examples[0]["prompt"])
    embeds = sampling.embed_prompt(model, processor, wave, text)
    sampling.check_model(model, processor, wave, text, embeds)
    changed = embeds + 0.3 * torch.randn(embeds.shape, generator=torch.Generator().manual_seed(0))
    with pytest.raises(sampling.UserError, match="nats"):
        sampling.check_model(model, processor, wave, text, changed)


def test_a_decoder_in_which_branches_see_each_other(prompt_embeds, monkeypatch):
    """As a recurrent one, which knows no mask."""
    model, _ = sampling.load_model(str(MODEL))
    scoring.check_model(model, prompt_embeds[0])
    forward = model.get_decoder().forward
    monkeypatch.setattr(model.get_decoder(), "forward",
                        lambda attention_mask, **named: forward(**named))
    with pytest.raises(sampling.UserError, match="see each other"):
        scoring.check_model(model, prompt_embeds[0])


def test_nothing_is_written_for_a_model_that_is_refused(tmp_path, rounds, monkeypatch):
    run = shutil.copytree(rounds.sampled, tmp_path / "run")
    (run / "surprisal.pt").unlink()
    monkeypatch.setattr(scoring, "trie_mask", lambda parents, P: torch.ones(2 * [P + len(parents)]).tril() > 0)
    with pytest.raises(sampling.UserError):
        scoring.main(scoring.sampling.stage_parser("", 2).parse_args(["--run", str(run)]))
    assert not (run / "surprisal.pt").exists()


# Prompts.

class WithBos:
    """A tokenizer that puts its <s> in front, whatever the text begins with; so does its template."""
    bos_token, bos_token_id, chat_template = "<s>", 1, "its own"

    def apply_chat_template(self, messages, **options):
        return "<s>" + messages[-1]["content"]

    def __call__(self, text):
        return SimpleNamespace(input_ids=[1] * (1 + text.startswith("<s>")) + [5])


def test_no_second_bos():
    processor = SimpleNamespace(audio_token="<a>", chat_template=None, tokenizer=WithBos())
    assert sampling.render_prompt(processor, "Listen: <audio>") == "Listen: <a>"


def test_a_decoder_that_merges_speech_itself_is_stopped_at_its_first_layer(tmp_path):
    model = loaded(phi4(), tmp_path)
    ids = torch.tensor([[5, 9, 11]])

    class Processor:
        tokenizer = staticmethod(lambda text: SimpleNamespace(input_ids=[5, 9, 11]))

        def __call__(self, **inputs):
            return transformers.BatchFeature({"input_ids": ids})

    embeds = sampling.embed_prompt(model, Processor(), torch.zeros(16000), "text")
    torch.testing.assert_close(embeds, model.get_input_embeddings()(ids[0]))
