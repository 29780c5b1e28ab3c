"""Tiny random models of the families that transformers has, and what a training step of each is given."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers

V = 331
D = 32
ROWS = (2, 24)  # more tokens than D: nothing but the logits has ROWS * V entries

TEXT = dict(vocab_size=V, pad_token_id=0, bos_token_id=1, eos_token_id=2, max_position_embeddings=64)
BLOCK = dict(hidden_size=D, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
PLAIN = dict(**TEXT, **BLOCK, attention_dropout=0.0)
GROUPED = dict(**PLAIN, num_key_value_heads=2)
EXPERTS = dict(**GROUPED, num_local_experts=2, num_experts_per_tok=1)
GPT = dict(
    **TEXT, n_positions=64, n_embd=D, n_layer=1, n_head=2, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, n_inner=48
)
BERT = dict(**TEXT, **BLOCK, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
BART = dict(
    **TEXT,
    d_model=D,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
    dropout=0.0,
    decoder_start_token_id=2,
)
IMAGE = dict(image_size=8, patch_size=4, num_channels=3)
VIT = dict(**BLOCK, **IMAGE, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)

Inputs = dict[str, torch.Tensor]


def tokens() -> torch.Tensor:
    return torch.randint(4, V, ROWS)


def text(**more: Any) -> Inputs:
    ids = tokens()
    labels = ids.clone()
    labels[0, :3] = -100
    return dict(input_ids=ids, labels=labels, **more)


def classes(*shape: int) -> torch.Tensor:
    return torch.randint(0, V, shape)


def images() -> Inputs:
    return dict(pixel_values=torch.randn(40, 3, 8, 8), labels=classes(40))


SHIFTED = "float, view; labels shifted"
VIEWED = "view"


@dataclass(frozen=True)
class Family:
    """A model class, the options of its configuration, its inputs, and what becomes of it.

    tail: what is between its head and its loss. graphs: into how many PyTorch itself breaks it. fused, declined: losses
    over classes; declined ones say `reason`.
    """

    model: str
    options: dict[str, Any]
    tail: str = SHIFTED
    inputs: Callable[[], Inputs] = text
    graphs: int = 1
    fused: int = 1
    declined: int = 0
    reason: str = ""
    configure: Callable[[dict[str, Any]], Any] | None = None
    evaluate: bool = False

    def build(self) -> torch.nn.Module:
        torch.manual_seed(0)
        kind = getattr(transformers, self.model)
        config = self.configure(self.options) if self.configure else kind.config_class(**self.options)
        model = kind(config)
        return model.eval() if self.evaluate else model.train()


def _towers(name: str) -> Callable[[dict[str, Any]], Any]:
    """The configuration of a text tower and an image tower."""

    def configure(options: dict[str, Any]) -> Any:
        text_options = {**BERT, "projection_dim": 16, **options}
        return getattr(transformers, name)(text_config=text_options, vision_config={**VIT, "projection_dim": 16})

    return configure


def _captions(options: dict[str, Any]) -> Any:
    decoder = transformers.BertConfig(**BERT, is_decoder=True, add_cross_attention=True)
    both = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(transformers.ViTConfig(**VIT), decoder)
    both.decoder_start_token_id, both.pad_token_id = 1, 0
    return both


def pairs() -> Inputs:
    return dict(input_ids=torch.randint(4, V, (6, 8)), pixel_values=torch.randn(6, 3, 8, 8), return_loss=True)


AUDIO = {**BART, "max_source_positions": 10, "max_target_positions": 64, "decoder_start_token_id": 1}
SSM = dict(**TEXT, hidden_size=D, num_hidden_layers=1, state_size=4, expand=1)  # the scan's states are small, too
MOE_SMALL = dict(**GROUPED, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16)
GEMMA = dict(**GROUPED, head_dim=16)

FAMILIES = {
    # one decoder, Hugging Face's common tail
    "llama": Family("LlamaForCausalLM", GROUPED),
    "llama, tied": Family("LlamaForCausalLM", {**GROUPED, "tie_word_embeddings": True}),
    "llama4": Family("Llama4ForCausalLM", {**EXPERTS, "intermediate_size_mlp": 48, "head_dim": 16}),
    "mistral": Family("MistralForCausalLM", GROUPED),
    "mixtral": Family("MixtralForCausalLM", EXPERTS),
    "gemma": Family("GemmaForCausalLM", GEMMA),
    "gemma3": Family("Gemma3ForCausalLM", GEMMA),
    "phi3": Family("Phi3ForCausalLM", GROUPED),
    "qwen2": Family("Qwen2ForCausalLM", GROUPED),
    "qwen2_moe": Family("Qwen2MoeForCausalLM", {**MOE_SMALL, "shared_expert_intermediate_size": 16}),
    "qwen3": Family("Qwen3ForCausalLM", GEMMA),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", MOE_SMALL),
    "olmo": Family("OlmoForCausalLM", GROUPED),
    "olmo2": Family("Olmo2ForCausalLM", GROUPED),
    "olmo3": Family("Olmo3ForCausalLM", GROUPED),
    "olmoe": Family("OlmoeForCausalLM", {**GROUPED, "num_experts": 2, "num_experts_per_tok": 1}),
    "falcon": Family("FalconForCausalLM", {**PLAIN, "hidden_dropout": 0.0}),
    "mpt": Family("MptForCausalLM", dict(vocab_size=V, d_model=D, n_heads=2, n_layers=1, max_seq_len=64)),
    "bloom": Family("BloomForCausalLM", dict(vocab_size=V, hidden_size=D, n_layer=1, n_head=2)),
    "gpt_neo": Family(
        "GPTNeoForCausalLM",
        dict(**TEXT, hidden_size=D, num_layers=1, num_heads=2, attention_types=[[["global"], 1]]),
    ),
    "gpt_neox": Family("GPTNeoXForCausalLM", PLAIN),
    "gpt_bigcode": Family("GPTBigCodeForCausalLM", GPT),
    "gpt_oss": Family("GptOssForCausalLM", {**EXPERTS, "head_dim": 16}),
    "stablelm": Family("StableLmForCausalLM", GROUPED),
    "starcoder2": Family("Starcoder2ForCausalLM", GROUPED),
    "smollm3": Family("SmolLM3ForCausalLM", GROUPED),
    "glm": Family("GlmForCausalLM", GEMMA),
    "glm4": Family("Glm4ForCausalLM", GEMMA),
    "nemotron": Family("NemotronForCausalLM", GROUPED),
    "persimmon": Family("PersimmonForCausalLM", PLAIN),
    "ernie4_5": Family("Ernie4_5ForCausalLM", GEMMA),
    "seed_oss": Family("SeedOssForCausalLM", {**GEMMA, "residual_dropout": 0.0}),
    "arcee": Family("ArceeForCausalLM", GROUPED),
    "helium": Family("HeliumForCausalLM", GEMMA),
    "bitnet": Family("BitNetForCausalLM", GROUPED),
    "biogpt": Family("BioGptForCausalLM", {**BERT, "activation_dropout": 0.0, "layerdrop": 0.0}),
    "xglm": Family(
        "XGLMForCausalLM",
        dict(**TEXT, d_model=D, ffn_dim=48, num_layers=1, attention_heads=2, dropout=0.0, attention_dropout=0.0),
    ),
    # one decoder, something else between head and loss
    "phi": Family("PhiForCausalLM", GROUPED, f"bias, {SHIFTED}"),
    "gptj": Family("GPTJForCausalLM", {**GPT, "rotary_dim": 8}, f"bias, {SHIFTED}"),
    "mamba": Family("MambaForCausalLM", SSM, f"float returned, {SHIFTED}"),
    "mamba2": Family(
        "Mamba2ForCausalLM",
        {**SSM, "num_heads": 2, "head_dim": 16, "n_groups": 1, "chunk_size": 8},
        f"float returned, {SHIFTED}",
    ),
    "falcon_mamba": Family("FalconMambaForCausalLM", SSM, f"float returned, {SHIFTED}"),
    "gemma2": Family("Gemma2ForCausalLM", GEMMA, f"tanh softcap, {SHIFTED}"),
    "cohere": Family("CohereForCausalLM", GROUPED, f"times a number, {SHIFTED}"),
    "cohere2": Family("Cohere2ForCausalLM", GROUPED, f"times a number, {SHIFTED}"),
    "granite": Family("GraniteForCausalLM", {**GROUPED, "logits_scaling": 8.0}, f"divided by a number, {SHIFTED}"),
    "granitemoe": Family(
        "GraniteMoeForCausalLM", {**EXPERTS, "logits_scaling": 8.0}, f"divided by a number, {SHIFTED}"
    ),
    "opt": Family(
        "OPTForCausalLM", {**PLAIN, "ffn_dim": 48, "word_embed_proj_dim": D, "dropout": 0.0}, f"contiguous, {SHIFTED}"
    ),
    # a warning between head and loss, that Dynamo would break the graph for
    "gpt2": Family("GPT2LMHeadModel", GPT, f"a logged warning, {SHIFTED}"),
    "openai-gpt": Family("OpenAIGPTLMHeadModel", GPT, f"a logged warning, {SHIFTED}"),
    "bert, causal": Family("BertLMHeadModel", {**BERT, "is_decoder": True}, f"a logged warning, bias, {SHIFTED}"),
    "ctrl": Family("CTRLLMHeadModel", {**GPT, "dff": 48}, f"a logged warning, bias, {SHIFTED}", graphs=3),
    # encoder and decoder
    "bart": Family("BartForConditionalGeneration", BART, f"bias added behind the head, {VIEWED}"),
    "mbart": Family("MBartForConditionalGeneration", BART, f"bias added behind the head, {VIEWED}"),
    "pegasus": Family("PegasusForConditionalGeneration", BART, f"bias added behind the head, {VIEWED}"),
    "marian": Family("MarianMTModel", {**BART, "decoder_vocab_size": V}, f"bias added behind the head, {VIEWED}"),
    "t5": Family(
        "T5ForConditionalGeneration",
        dict(
            **TEXT, d_model=D, d_kv=16, d_ff=48, num_layers=1, num_heads=2, dropout_rate=0.0, decoder_start_token_id=0
        ),
        VIEWED,
    ),
    # masked words
    "bert": Family("BertForMaskedLM", BERT, f"bias, {VIEWED}"),
    "electra": Family("ElectraForMaskedLM", {**BERT, "embedding_size": D}, f"bias, {VIEWED}"),
    "albert": Family("AlbertForMaskedLM", {**BERT, "embedding_size": D}, f"bias, {VIEWED}"),
    "deberta_v2": Family("DebertaV2ForMaskedLM", BERT, f"bias, {VIEWED}"),
    "roberta": Family("RobertaForMaskedLM", {**BERT, "max_position_embeddings": 70}, f"bias, {VIEWED}"),
    "distilbert": Family(
        "DistilBertForMaskedLM",
        dict(**TEXT, dim=D, n_layers=1, n_heads=2, hidden_dim=48, dropout=0.0, attention_dropout=0.0),
        f"bias, {VIEWED}",
    ),
    "modernbert": Family("ModernBertForMaskedLM", PLAIN, f"bias, float, {VIEWED}"),
    "bert, pretraining": Family(
        "BertForPreTraining",
        BERT,
        f"two heads, bias, {VIEWED}",
        lambda: text(next_sentence_label=torch.tensor([0, 1])),
        fused=2,
    ),
    # speech, images, both
    "whisper": Family(
        "WhisperForConditionalGeneration",
        {**AUDIO, "num_mel_bins": 8},
        VIEWED,
        lambda: dict(input_features=torch.randn(2, 8, 20), labels=tokens()),
    ),
    "speech_to_text": Family(
        "Speech2TextForConditionalGeneration",
        {**AUDIO, "max_source_positions": 40, "input_feat_per_channel": 8, "conv_channels": 16},
        VIEWED,
        lambda: dict(input_features=torch.randn(2, 20, 8), labels=tokens()),
    ),
    "trocr": Family(
        "TrOCRForCausalLM",
        dict(**TEXT, d_model=D, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=48, dropout=0.0),
        VIEWED,
    ),
    "vit and bert": Family(
        "VisionEncoderDecoderModel",
        {},
        "bias, reshape",
        lambda: dict(pixel_values=torch.randn(2, 3, 8, 8), labels=tokens()),
        configure=_captions,
    ),
    "llava": Family(
        "LlavaForConditionalGeneration",
        {},
        SHIFTED,
        lambda: (lambda ids: dict(input_ids=ids, labels=ids, pixel_values=torch.randn(2, 3, 8, 8)))(
            torch.cat([torch.full((2, 4), 3), tokens()[:, 4:]], 1)
        ),
        graphs=4,
        configure=lambda _: transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(**VIT, projection_dim=16),
            text_config=transformers.LlamaConfig(**PLAIN),
            image_token_index=3,
        ),
    ),
    "clip": Family(
        "CLIPModel",
        {},
        "similarities of both towers, learned temperature, both directions",
        pairs,
        fused=2,
        configure=_towers("CLIPConfig"),
    ),
    "vit": Family("ViTForImageClassification", {**VIT, "num_labels": V}, f"bias, {VIEWED}", images),
    "resnet": Family(
        "ResNetForImageClassification",
        dict(embedding_size=8, hidden_sizes=[8, D], depths=[1, 1], num_labels=V),
        f"bias, {VIEWED}",
        images,
        evaluate=True,
    ),
    "convnext": Family(
        "ConvNextForImageClassification",
        dict(num_stages=2, hidden_sizes=[8, D], depths=[1, 1], num_labels=V),
        f"bias, {VIEWED}",
        images,
    ),
    # classes that are not words
    "bert, sequences": Family(
        "BertForSequenceClassification",
        {**BERT, "num_labels": V},
        f"bias, {VIEWED}",
        lambda: dict(input_ids=torch.randint(4, V, (40, 3)), labels=classes(40)),
    ),
    "bert, tokens": Family(
        "BertForTokenClassification",
        {**BERT, "num_labels": V},
        f"bias, {VIEWED}",
        lambda: dict(input_ids=tokens(), labels=classes(*ROWS)),
    ),
    "llama, sequences": Family(
        "LlamaForSequenceClassification",
        {**GROUPED, "num_labels": V},
        "one row of each sequence, by two indices",
        lambda: dict(input_ids=torch.randint(4, V, (40, 3)), labels=classes(40)),
    ),
    # looks like a head, and is none
    "bert, questions": Family(
        "BertForQuestionAnswering",
        {**BERT, "num_labels": 2},
        "split, a softmax over positions",
        lambda: dict(input_ids=tokens(), start_positions=torch.tensor([1, 2]), end_positions=torch.tensor([3, 4])),
        fused=0,
        declined=2,
        reason="squeeze of the class dimension, or of one of symbolic size",
    ),
    "bert, multiple choice": Family(
        "BertForMultipleChoice",
        BERT,
        "one logit for each choice, regrouped",
        lambda: dict(input_ids=tokens().view(2, 4, 6), labels=torch.tensor([1, 2])),
        fused=0,
        declined=1,
        reason="gives one number for each row, and no logits of classes",
    ),
}
