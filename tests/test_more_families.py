"""Are the log-probabilities those of each family's own forward, and is a model refused where they are not?
Random checkpoints by the families' own classes, their weights large enough that mistakes show."""
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


# All stages, with each family's own processor. Some need packages beyond the six.

def flamingo(name):
    tokenizer, ids = tokenizer_with("<sound>", "<|sound_bos|>", "<|sound_eos|>")
    audio = {"model_type": "audioflamingo3_encoder", "num_hidden_layers": 2, "num_attention_heads": 4,
             "hidden_size": 64, "intermediate_size": 96, "num_mel_bins": 128}
    more = {"audio_bos_token_id": ids[1], "audio_eos_token_id": ids[2]} if "Music" in name else {}
    config = getattr(transformers, f"{name}Config")(
        audio_config=audio, text_config={"model_type": "qwen2", **TEXT}, audio_token_id=ids[0], **more)
    features = transformers.WhisperFeatureExtractor(feature_size=128)
    return config, getattr(transformers, f"{name}Processor")(features, tokenizer)


def glm_asr(name):
    tokenizer, ids = tokenizer_with("<|pad|>")
    audio = {"model_type": "glmasr_encoder", "num_hidden_layers": 2, "num_attention_heads": 4,
             "hidden_size": 64, "intermediate_size": 256}
    config = transformers.GlmAsrConfig(
        audio_config=audio, text_config={"model_type": "llama", "head_dim": 16, **TEXT}, audio_token_id=ids[0])
    features = transformers.WhisperFeatureExtractor(feature_size=128)
    return config, transformers.GlmAsrProcessor(features, tokenizer)


def tokenizer_naming(**tokens):
    """A tokenizer that knows its special tokens by name, as those of newer families do."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL, extra_special_tokens=tokens)
    tokenizer.chat_template = TEMPLATE
    return tokenizer, {f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in tokens.items()}


OMNI_TOKENS = {"audio_token": "<|AUDIO|>", "audio_bos_token": "<|audio_bos|>", "audio_eos_token": "<|audio_eos|>"}
OMNI_LOOKS = {"image_token": "<|IMAGE|>", "video_token": "<|VIDEO|>", "vision_bos_token": "<|vision_bos|>",
              "vision_eos_token": "<|vision_eos|>"}


def qwen3_asr(name):
    tokenizer, ids = tokenizer_naming(**OMNI_TOKENS)
    config = transformers.Qwen3ASRConfig(
        audio_config={**OMNI_AUDIO, "downsample_hidden_size": 16, "num_hidden_layers": 2},
        text_config={**TEXT, "model_type": "qwen3", "head_dim": 16}, audio_token_id=ids["audio_token_id"])
    return config, transformers.Qwen3ASRProcessor(transformers.Qwen3ASRFeatureExtractor(), tokenizer)


def moss(name):
    tokenizer, [audio_id, *_] = tokenizer_with("<|audio_pad|>", "<|audio_start|>", "<|audio_end|>")
    audio = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.MossTranscribeDiarizeConfig(
        audio_config=audio, text_config={**TEXT, "model_type": "qwen3", "head_dim": 16}, audio_token_id=audio_id)
    features = transformers.MossTranscribeDiarizeFeatureExtractor(feature_size=80)
    return config, transformers.MossTranscribeDiarizeProcessor(features, tokenizer)


def vibevoice(name):
    """Its encoder adds noise to what it hears."""
    tokenizer, [audio_id, *_] = tokenizer_with("<|box_start|>", "<|object_ref_start|>", "<|object_ref_end|>")
    encoder = {"num_filters": 4, "depths": [1] * 7}
    config = transformers.VibeVoiceAsrConfig(
        acoustic_tokenizer_encoder_config={**encoder, "hidden_size": 16}, audio_token_id=audio_id,
        semantic_tokenizer_encoder_config={**encoder, "hidden_size": 24}, text_config={**TEXT, "model_type": "qwen2"})
    features = transformers.VibeVoiceAcousticTokenizerFeatureExtractor()
    return config, transformers.VibeVoiceAsrProcessor(features, tokenizer)


def omni(name):
    tokenizer, ids = tokenizer_naming(**OMNI_TOKENS, **OMNI_LOOKS)
    kind = "index" if name == "Qwen2_5Omni" else "id"
    places = {f"{what}_token_{kind}": ids[f"{what}_token_id"] for what in ("audio", "image", "video")}
    config = qwen25_omni() if name == "Qwen2_5Omni" else qwen3_omni()
    config.thinker_config.update({**places, "audio_start_token_id": ids["audio_bos_token_id"],
                                  "vision_start_token_id": ids["vision_bos_token_id"]})
    processor = getattr(transformers, f"{name}Processor")(
        transformers.Qwen2VLImageProcessor(), transformers.Qwen2VLVideoProcessor(),
        transformers.WhisperFeatureExtractor(feature_size=128), tokenizer)
    return config, processor


def phi4_multimodal(name):
    tokenizer, ids = tokenizer_naming(audio_token="<|audio|>", image_token="<|image|>")
    config = phi4()
    config.audio_config.audio_token_id = ids["audio_token_id"]
    config.vision_config.image_token_id = ids["image_token_id"]
    return config, transformers.Phi4MultimodalProcessor(
        transformers.Phi4MultimodalImageProcessor(), transformers.Phi4MultimodalFeatureExtractor(), tokenizer)


FAMILIES = {"AudioFlamingo3": flamingo, "MusicFlamingo": flamingo, "GlmAsr": glm_asr, "Qwen3ASR": qwen3_asr,
            "MossTranscribeDiarize": moss, "VibeVoiceAsr": vibevoice,
            "Qwen2_5Omni": omni, "Qwen3OmniMoe": omni, "Phi4Multimodal": phi4_multimodal}
NEED_TORCHVISION = ["Qwen2_5Omni", "Qwen3OmniMoe", "Phi4Multimodal"]


@pytest.fixture(scope="module", params=FAMILIES)
def hearing(request, tmp_path_factory):
    """(the published class, folder of a checkpoint in its published layout)."""
    name = request.param
    if name in NEED_TORCHVISION:
        pytest.importorskip("torchvision", exc_type=ImportError)
    folder = tmp_path_factory.mktemp(name)
    config, processor = FAMILIES[name](name)
    ending = "ForCausalLM" if name == "Phi4Multimodal" else "ForConditionalGeneration"
    published = getattr(transformers, name + ending)
    random_weights(published(config)).save_pretrained(folder)
    processor.save_pretrained(folder)
    torch.save({}, folder / "spk_dict.pt")  # of voices, beside a published Qwen2.5-Omni
    return published, folder


def rollout_of(embeds):
    return {"embeds": embeds, "responses": RESPONSES, "lengths": torch.tensor([3, 3, 3])}


def own_logps(model, processor, rollout):
    """(K, T) by the model's own forward, a response at a time after the clip and its prompt."""
    extractor = getattr(processor, "feature_extractor", None) or processor.audio_processor
    wave = sampling.load_audio(rollout["audio"], extractor.sampling_rate)
    inputs = sampling.encode(model, processor, wave, sampling.render_prompt(processor, rollout["prompt"]))
    logps = torch.zeros(rollout["responses"].shape)
    for k, length in enumerate(rollout["lengths"].tolist()):
        response = rollout["responses"][k:k + 1, :length]
        ids = torch.cat([inputs["input_ids"], response], dim=1)
        whole = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        torch.manual_seed(0)  # as in 01, for VibeVoice's noise
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
    reference = getattr(reference, "thinker", reference)  # Omni's part that writes
    found = load(tmp_path, "surprisal")["prompts"]
    with torch.no_grad():
        refs = [own_logps(reference, processor, rollout) for rollout in load(tmp_path, "rollouts")["prompts"]]
        policy = PeftModel.from_pretrained(reference, tmp_path / "adapter").eval()
        olds = [own_logps(policy, processor, rollout) for rollout in load(tmp_path, "rollouts")["prompts"]]
    for score, old, ref in zip(found, olds, refs):
        torch.testing.assert_close(score["logp_old"], old, atol=1e-3, rtol=0)
        torch.testing.assert_close(score["logp_ref"], ref, atol=1e-3, rtol=0)
        assert (old - ref).abs().max() > 0.01


def test_it_hears_in_bfloat16(hearing, examples):
    """As on a GPU: not every encoder casts what its processor makes of a clip. And the checks of 01
    and 02 do not take rounding for a wrong model."""
    model, processor = sampling.load_model(str(hearing[1]))
    rate = sampling.feature_extractor(processor).sampling_rate
    wave = sampling.load_audio(examples[0]["audio"], rate)
    text = sampling.render_prompt(processor, examples[0]["prompt"])
    embeds = sampling.embed_prompt(model, processor, wave, text)
    rounded = sampling.embed_prompt(model.to(torch.bfloat16), processor, wave, text)
    assert rounded.dtype == torch.bfloat16 and rounded.isfinite().all()
    if not hearing[0].__name__.startswith("VibeVoice"):  # its noise is another one in bfloat16
        assert (rounded.float() - embeds).norm() < 0.1 * embeds.norm()
    sampling.check_own_forward(model, processor, wave, text, rounded)
    scoring.check_trie(model, rollout_of(rounded))


# The language model alone, of families whose processors need packages beyond the six.

def qwen25_omni():
    text = {**TEXT, "rope_scaling": ROPE}
    return transformers.Qwen2_5OmniConfig(
        enable_audio_output=False,
        thinker_config={"audio_config": OMNI_AUDIO, "vision_config": OMNI_VISION, "text_config": text})


def qwen3_omni():
    text = {**TEXT, "rope_scaling": ROPE, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2,
            "moe_intermediate_size": 32}
    audio = {**OMNI_AUDIO, "downsample_hidden_size": 16}
    vision = {**OMNI_VISION, "deepstack_visual_indexes": [0]}
    return transformers.Qwen3OmniMoeConfig(
        enable_audio_output=False,
        thinker_config={"audio_config": audio, "vision_config": vision, "text_config": text})


def phi4():
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "crop_size": 28, "patch_size": 14}
    audio = {"hidden_size": 32, "intermediate_size": 32, "num_blocks": 2, "num_attention_heads": 2,
             "ext_pw_out_channel": 32, "depthwise_separable_out_channel": 32, "nemo_conv_channels": 32}
    return transformers.Phi4MultimodalConfig(
        **TEXT, pad_token_id=0, bos_token_id=1, eos_token_id=2, vision_config=vision, audio_config=audio)


def loaded(config, folder):
    """As 02 and 05 load it; with the file of voices that a published Qwen2.5-Omni brings."""
    names = {"Phi4MultimodalConfig": "Phi4MultimodalForCausalLM"}
    name = type(config).__name__
    published = names.get(name, name.replace("Config", "ForConditionalGeneration"))
    random_weights(getattr(transformers, published)(config)).save_pretrained(folder)
    torch.save({}, folder / "spk_dict.pt")
    return sampling.load_model(str(folder), audio=False)[0]


def embeds_for(model):
    width = model.get_input_embeddings().weight.shape[1]
    return torch.randn(11, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("build, layers", [
    (qwen25_omni, ALL), (lambda: qwen25_omni().thinker_config, ALL),
    (qwen3_omni, ATTENTION), (lambda: qwen3_omni().thinker_config, ATTENTION),
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
    scoring.check_trie(model, rollout_of(embeds))
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

def gemma4():
    return transformers.Gemma4Config(
        text_config={**TEXT, "head_dim": 16, "global_head_dim": 16, "hidden_size_per_layer_input": 0,
                     "num_kv_shared_layers": 0, "vocab_size_per_layer_input": 544,
                     "layer_types": ["sliding_attention", "full_attention"]},
        vision_config=None, audio_config=None)


def qwen2_audio_with_a_window():
    config = transformers.AutoConfig.from_pretrained(MODEL)
    config.text_config.layer_types = ["full_attention", "full_attention", "full_attention", "sliding_attention"]
    return config


@pytest.mark.parametrize("config", [gemma4, qwen2_audio_with_a_window])
@pytest.mark.parametrize("audio", [True, False])
def test_layers_that_see_a_window_are_refused_before_anything_is_loaded(tmp_path, config, audio):
    """The configuration is all that there is of this model."""
    config().save_pretrained(tmp_path)
    with pytest.raises(sampling.UserError, match=f"^{tmp_path} has layers that see a sliding window: ") as error:
        sampling.load_model(str(tmp_path), audio=audio)
    assert "\n" not in str(error.value)


def test_a_decoder_that_takes_more_than_embeddings(demo, examples):
    """As Gemma 3n does: then the embeddings alone give other log-probabilities."""
    model, processor = demo
    wave = sampling.load_audio(examples[0]["audio"], 16000)
    text = sampling.render_prompt(processor, examples[0]["prompt"])
    embeds = sampling.embed_prompt(model, processor, wave, text)
    sampling.check_own_forward(model, processor, wave, text, embeds)
    changed = embeds + 0.3 * torch.randn(embeds.shape, generator=torch.Generator().manual_seed(0))
    with pytest.raises(sampling.UserError, match="KL of [0-9.]+ nats"):
        sampling.check_own_forward(model, processor, wave, text, changed)


def test_a_model_whose_layers_take_no_embeddings(demo, monkeypatch):
    model, processor = demo
    monkeypatch.setattr(model, "forward", lambda **inputs: None)
    text = sampling.render_prompt(processor, "What?")
    with pytest.raises(sampling.UserError, match="take no embeddings"):
        sampling.embed_prompt(model, processor, torch.zeros(16000), text)


def recurrent(folder):
    """Granite 4.0-H inside Granite Speech."""
    text = {**TEXT, "model_type": "granitemoehybrid", "layer_types": ["mamba", "attention"], "mamba_n_heads": 8,
            "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 16, "num_local_experts": 0,
            "shared_intermediate_size": 96}
    encoder = {"hidden_dim": 32, "num_layers": 1, "num_heads": 4, "dim_head": 8, "context_size": 50}
    projector = {"model_type": "blip_2_qformer", "encoder_hidden_size": 32, "hidden_size": 32,
                 "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 32}
    return loaded(transformers.GraniteSpeechConfig(
        encoder_config=encoder, projector_config=projector, text_config=text, has_lora_adapter=False), folder)


def test_siblings_share_the_state_of_a_recurrent_decoder(tmp_path):
    model = recurrent(tmp_path)
    with pytest.raises(sampling.UserError, match="see each other"):
        scoring.check_trie(model, rollout_of(embeds_for(model)))


def test_a_recurrent_decoder_is_refused_at_the_first_clip(tmp_path, monkeypatch):
    model = recurrent(tmp_path)
    embeds = embeds_for(model)
    monkeypatch.setattr(sampling, "encode", lambda model, *rest: {"inputs_embeds": embeds[None]})
    with pytest.raises(sampling.UserError, match="cache of keys and values"):
        sampling.check_own_forward(model, None, None, None, embeds)


def test_nothing_is_written_for_a_model_that_is_refused(tmp_path, rounds, monkeypatch):
    run = shutil.copytree(rounds.sampled, tmp_path / "run")
    (run / "surprisal.pt").unlink()
    monkeypatch.setattr(scoring, "trie_mask", lambda parents, P: torch.ones(2 * [P + len(parents)]).tril() > 0)
    with pytest.raises(sampling.UserError, match="see each other"):
        scoring.main(scoring.sampling.stage_parser("", 2).parse_args(["--run", str(run)]))
    assert not (run / "surprisal.pt").exists()


def test_a_decoder_that_merges_speech_itself_is_stopped_at_its_first_layer(tmp_path):
    model = loaded(phi4(), tmp_path)
    ids = torch.tensor([[5, 9, 11]])

    class Processor:
        tokenizer = staticmethod(lambda text: SimpleNamespace(input_ids=[5, 9, 11]))

        def __call__(self, text, audio, return_tensors):
            return transformers.BatchFeature({"input_ids": ids})

    embeds = sampling.embed_prompt(model, Processor(), torch.zeros(16000), "text")
    torch.testing.assert_close(embeds, model.get_input_embeddings()(ids[0]))
