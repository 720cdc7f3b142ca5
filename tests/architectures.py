"""Small models of the architectures that the notebook is tried on, by their configurations."""

import copy

import torch
import transformers
from transformers import AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from rehearsal.notebook import alone

SWITCH_OFF_DROPOUT = alone("skeleton")["switch_off_attention_dropout"]

TINY = dict(
    vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4
)
GROUPED = dict(TINY, num_key_value_heads=2)
PADDED = dict(GROUPED, pad_token_id=0)
GPT = dict(vocab_size=97, n_embd=32, n_layer=4, n_head=4)
HALF_WINDOWS = dict(use_sliding_window=True, sliding_window=5, max_window_layers=2)
WINDOWS = dict(sliding_window=5, layer_types=["sliding_attention", "full_attention"] * 2)
BY_LAYER = dict(
    WINDOWS, hidden_size_per_layer_input=8, vocab_size_per_layer_input=97, num_kv_shared_layers=1
)
# Dense bases, whose prompts can be run once.
DENSE = {
    "mistral": transformers.MistralConfig(**GROUPED, sliding_window=None),
    "mistral, window of 7": transformers.MistralConfig(**GROUPED, sliding_window=7),
    "llama": transformers.LlamaConfig(**GROUPED),
    "llama, one head a key": transformers.LlamaConfig(**TINY),
    "qwen 2": transformers.Qwen2Config(**GROUPED),
    "qwen 2, window of 5 in half of the layers": transformers.Qwen2Config(
        **GROUPED, **HALF_WINDOWS
    ),
    "qwen 3": transformers.Qwen3Config(**GROUPED, head_dim=16),
    "gemma 3, window of 5 in some layers": transformers.Gemma3TextConfig(
        **GROUPED, head_dim=8, **WINDOWS
    ),
    "apertus": transformers.ApertusConfig(**GROUPED),
    "cohere": transformers.CohereConfig(**GROUPED),
    "cohere 2, window": transformers.Cohere2Config(**GROUPED, **WINDOWS),
    "ernie 4.5": transformers.Ernie4_5Config(**GROUPED, head_dim=8),
    "exaone 4, window": transformers.Exaone4Config(**GROUPED, **WINDOWS),
    "gemma": transformers.GemmaConfig(**GROUPED, head_dim=8),
    "gemma 3n, window": transformers.Gemma3nTextConfig(
        **GROUPED
        | BY_LAYER
        | dict(intermediate_size=[64] * 4, activation_sparsity_pattern=[0.5, 0.0, 0.0, 0.0]),
        head_dim=8,
        laurel_rank=4,
    ),
    "gemma 4, window": transformers.Gemma4TextConfig(
        **GROUPED, **BY_LAYER, head_dim=8, global_head_dim=16
    ),
    "glm": transformers.GlmConfig(**PADDED, head_dim=8),
    "glm 4": transformers.Glm4Config(**PADDED, head_dim=8),
    "gpt-2": transformers.GPT2Config(**GPT),
    "gpt-j": transformers.GPTJConfig(**GPT, rotary_dim=4),
    "gpt-neox": transformers.GPTNeoXConfig(**TINY),
    "granite": transformers.GraniteConfig(**GROUPED),
    "granite 4, dense": transformers.GraniteMoeHybridConfig(
        **GROUPED,
        layer_types=["full_attention"] * 4,
        num_local_experts=0,
        shared_intermediate_size=64,
        mamba_n_heads=4,
        mamba_d_head=16,
    ),
    "helium": transformers.HeliumConfig(**GROUPED, head_dim=8),
    "hunyuan": transformers.HunYuanDenseV1Config(**GROUPED, head_dim=8),
    "lfm 2, all attention": transformers.Lfm2Config(**GROUPED, layer_types=["full_attention"] * 4),
    "ministral 3": transformers.Ministral3Config(**GROUPED, head_dim=8),
    "nanochat": transformers.NanoChatConfig(**GROUPED),
    "olmo": transformers.OlmoConfig(**GROUPED),
    "olmo 2": transformers.Olmo2Config(**GROUPED),
    "olmo 3, window": transformers.Olmo3Config(**GROUPED, **WINDOWS),
    "opt": transformers.OPTConfig(**TINY, ffn_dim=64, word_embed_proj_dim=32),
    "phi": transformers.PhiConfig(**GROUPED),
    "phi 3": transformers.Phi3Config(**PADDED),
    "seed-oss": transformers.SeedOssConfig(**GROUPED, head_dim=8),
    "smollm 3": transformers.SmolLM3Config(**PADDED),
    "starcoder 2, window": transformers.Starcoder2Config(**GROUPED, sliding_window=5),
}
MAMBA = dict(mamba_n_heads=4, mamba_d_head=16, mamba_n_groups=1, mamba_d_state=16)
DELTA = dict(
    layer_types=["linear_attention"] * 3 + ["full_attention"],
    linear_num_key_heads=4,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
)
# Bases whose layers are not all attention, and what is said to be the reason.
HYBRIDS = {
    "qwen 3.5": (
        transformers.Qwen3_5TextConfig(**GROUPED, **DELTA, head_dim=16),
        "Qwen3_5GatedDeltaNet",
    ),
    "lfm 2": (
        transformers.Lfm2Config(**GROUPED, layer_types=["conv", "full_attention"] * 2),
        "Conv1d",
    ),
    "bamba": (
        transformers.BambaConfig(**GROUPED, **MAMBA, mamba_expand=2, attn_layer_indices=[1, 3]),
        "BambaMixer",
    ),
    "zamba 2": (
        transformers.Zamba2Config(
            **TINY,
            layers_block_type=["mamba", "hybrid"] * 2,
            mamba_d_state=16,
            n_mamba_heads=4,
            mamba_ngroups=1,
            num_mem_blocks=1,
            adapter_rank=4,
        ),
        "Zamba2MambaMixer",
    ),
    "olmo hybrid": (transformers.OlmoHybridConfig(**PADDED, **DELTA), "OlmoHybridGatedDeltaNet"),
    "falcon h1": (transformers.FalconH1Config(**GROUPED, **MAMBA, mamba_d_ssm=64), "FalconH1Mixer"),
}
# Bases of other kinds that cannot, and what is said to be the reason.
OTHERS = {
    "bloom": (
        transformers.BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4),
        "BloomAttention",
    ),
    "experts": (transformers.Qwen3MoeConfig(**GROUPED, head_dim=8, num_experts=2), "experts"),
    "gpt-neo": (
        transformers.GPTNeoConfig(**GPT, num_layers=4, attention_types=[[["global", "local"], 2]]),
        "GPTNeoAttention",
    ),
    "mamba 2": (
        transformers.Mamba2Config(vocab_size=97, hidden_size=32, num_heads=4, head_dim=16),
        "Mamba2Mixer",
    ),
    "scores are capped": (
        transformers.Gemma2Config(**GROUPED, head_dim=8),
        "scaled_dot_product_attention",
    ),
    "both directions": (
        transformers.Gemma3TextConfig(**GROUPED, use_bidirectional_attention=True),
        "not causal",
    ),
    "window in the mask": (transformers.PhimoeConfig(**GROUPED, sliding_window=5), "window"),
    "recurrent": (
        transformers.RwkvConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2),
        "Rwkv",
    ),
    "no state, no attention": (
        transformers.MiniMaxConfig(
            **GROUPED, layer_types=["linear_attention", "full_attention"] * 2
        ),
        "MiniMaxLightningAttention",
    ),
    "chunks in the mask": (
        transformers.Llama4TextConfig(
            **PADDED, head_dim=8, intermediate_size_mlp=64, interleave_moe_layer_step=100
        ),
        "layers of chunked_attention",
    ),
    "chooses what it sees": (
        transformers.DeepseekV32Config(**GROUPED, mlp_layer_types=["dense"] * 4),
        "Indexer",
    ),
}

# Wider ones, for the arithmetic of memory: what was measured over what is predicted, at least and
# at most.
WIDE = dict(
    vocab_size=97,
    hidden_size=256,
    intermediate_size=896,
    num_hidden_layers=6,
    num_attention_heads=8,
)
WIDE_GROUPED = dict(WIDE, num_key_value_heads=2)
WIDE_BY_LAYER = dict(
    WIDE_GROUPED,
    sliding_window=50,
    layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
    hidden_size_per_layer_input=16,
    vocab_size_per_layer_input=97,
    num_kv_shared_layers=3,
    head_dim=32,
)
PLANNED = {
    "mistral": (
        transformers.MistralConfig(**WIDE_GROUPED, head_dim=64, sliding_window=None),
        0.95,
        1.1,
    ),
    "mistral, window": (transformers.MistralConfig(**WIDE_GROUPED, sliding_window=50), 0.95, 1.1),
    "qwen 3": (transformers.Qwen3Config(**WIDE_GROUPED, head_dim=32), 0.95, 1.1),
    "qwen 3, wide heads": (transformers.Qwen3Config(**WIDE_GROUPED, head_dim=64), 0.95, 1.1),
    "phi 3, fused": (transformers.Phi3Config(**WIDE_GROUPED, pad_token_id=0), 0.85, 1.1),
    "glm 4, four norms": (
        transformers.Glm4Config(**WIDE_GROUPED, pad_token_id=0, head_dim=32),
        0.95,
        1.1,
    ),
    "granite 4, dense": (
        transformers.GraniteMoeHybridConfig(
            **WIDE_GROUPED,
            layer_types=["full_attention"] * 6,
            num_local_experts=0,
            shared_intermediate_size=896,
            mamba_n_heads=8,
            mamba_d_head=64,
        ),
        0.95,
        1.1,
    ),
    "gemma 4": (transformers.Gemma4TextConfig(**WIDE_BY_LAYER, global_head_dim=64), 0.95, 1.1),
    "gemma 3n": (
        transformers.Gemma3nTextConfig(
            **WIDE_BY_LAYER | dict(intermediate_size=[896] * 6),
            laurel_rank=16,
            activation_sparsity_pattern=[0.95] * 2 + [0.0] * 4,
        ),
        0.95,
        1.1,
    ),
    # Of these the plan says too much rather than too little.
    "gpt-neo": (
        transformers.GPTNeoConfig(
            **dict(vocab_size=97, hidden_size=256, num_layers=6, num_heads=8),
            attention_types=[[["global", "local"], 3]],
        ),
        0.5,
        1.1,
    ),
    "gemma 2, scores kept": (transformers.Gemma2Config(**WIDE_GROUPED, head_dim=32), 0.5, 1.1),
    "mamba 2": (
        transformers.Mamba2Config(
            **dict(
                vocab_size=97, hidden_size=256, num_hidden_layers=6, state_size=64, chunk_size=64
            ),
            num_heads=8,
            head_dim=64,
            n_groups=1,
        ),
        0.5,
        1.1,
    ),
}

FIELDS = ("log_probs", "entropy", "mean_logits", "is_top1")  # what TRL's fused head returns


def skeleton_of(config):
    """A model without weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(config))


def build(config, dtype=torch.float32):
    """A model of random weights with TRL's fused head, as a trainer has it, without dropout."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    SWITCH_OFF_DROPOUT(model)
    add_fused_lm_head(model, outputs=FIELDS)
    return model
