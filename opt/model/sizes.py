"""The published OPT models by size: architecture constants, so that the benchmark needs no network.

Zhang et al., "OPT: Open Pre-trained Transformer Language Models" (arXiv:2205.01068), table 1, and
the models' config.json.
"""

from transformers import OPTConfig

# layers, heads, hidden size; the feed-forward layer is 4 x hidden
_SIZES = {
    "125m": (12, 12, 768),
    "350m": (24, 16, 1024),
    "1.3b": (24, 32, 2048),
    "2.7b": (32, 32, 2560),
    "6.7b": (32, 32, 4096),
    "13b": (40, 40, 5120),
    "30b": (48, 56, 7168),
    "66b": (64, 72, 9216),
    "175b": (96, 96, 12288),
}
PRESETS = tuple(_SIZES)


def layer_matrices(config: OPTConfig) -> int:
    """Elements of all matrices in the decoder layers."""
    hidden = config.hidden_size
    return config.num_hidden_layers * (4 * hidden**2 + 2 * hidden * config.ffn_dim)


def num_parameters(config: OPTConfig) -> int:
    """Of the whole model, a tied head counted once."""
    hidden, layers, wide = config.hidden_size, config.num_hidden_layers, config.ffn_dim
    biases = 5 * hidden + wide if config.enable_bias else 0
    norms = 2 * 2 * hidden if config.layer_norm_elementwise_affine else 0
    total = layer_matrices(config) + layers * (biases + norms) + embedding_parameters(config)
    if config.do_layer_norm_before and not config._remove_final_layer_norm:
        total += norms // 2
    if not config.tie_word_embeddings:
        total += config.vocab_size * config.word_embed_proj_dim
    if config.word_embed_proj_dim != hidden:
        total += 2 * hidden * config.word_embed_proj_dim
    return total


def embedding_parameters(config: OPTConfig) -> int:
    """Of tokens and positions, of which OPT has two more than it uses."""
    positions = config.hidden_size * (config.max_position_embeddings + 2)
    return config.vocab_size * config.word_embed_proj_dim + positions


def preset_config(size: str) -> OPTConfig:
    """The configuration of OPT-`size`."""
    layers, heads, hidden = _SIZES[size]
    config = OPTConfig(
        num_hidden_layers=layers,
        num_attention_heads=heads,
        hidden_size=hidden,
        ffn_dim=4 * hidden,
        vocab_size=50272,
        max_position_embeddings=2048,
        dropout=0.1,
        attention_dropout=0.0,
        # 350m alone normalises after its blocks and has a narrower embedding.
        do_layer_norm_before=size != "350m",
        word_embed_proj_dim=512 if size == "350m" else hidden,
    )
    config._attn_implementation = "sdpa"
    return config
