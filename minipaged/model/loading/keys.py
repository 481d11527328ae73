"""Every key that transformers and llama.cpp read of the models we can run, and what becomes of it here.

A key that changes the numbers or the text is read, refused or warned of, never skipped. The tables are held complete by
tests/model/test_keys.py: against the config classes of transformers and against the keys that the `gguf` package names.
A key in none of the tables is one that neither program reads. Imports no torch.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from minipaged.errors import ModelError

LOG = logging.getLogger("minipaged")


@dataclass(frozen=True, slots=True)
class Key:
    """What becomes of one key: `read` by the loader, without `effect` on what a model says, or, if its value is not among
    `harmless`, `refused` or `warned` of in one line."""

    fate: Literal["read", "no effect", "refused", "warned"]
    why: str = ""
    harmless: tuple[Any, ...] = (None, False, 0)


READ = Key("read")


def check_keys(values: Mapping[str, Any], table: Mapping[str, Key], path: Path, prefix: str = "") -> None:
    """Raise ModelError for a refused key, and log a line for one that is warned of."""
    for name, value in values.items():
        key = table.get(name)
        if key is None or key.fate in ("read", "no effect") or _is_harmless(value, key.harmless):
            continue
        shown = f"{path}: {prefix}{name} {value!r:.60}"
        if key.fate == "refused":
            raise ModelError(f"{shown} is not supported: {key.why}")
        LOG.warning("%s is not applied: %s", shown, key.why)


def _is_harmless(value: Any, harmless: tuple[Any, ...]) -> bool:
    return value in harmless or (isinstance(value, list | dict | str) and not value)


def _no_effect(why: str, *names: str) -> dict[str, Key]:
    return dict.fromkeys(names, Key("no effect", why))


def _refused(**reasons: str) -> dict[str, Key]:
    return {name: Key("refused", why) for name, why in reasons.items()}


def _read(*names: str) -> dict[str, Key]:
    return dict.fromkeys(names, READ)


# config.json
CONFIG_KEYS: dict[str, Key] = {
    **_read(
        *("model_type", "architectures", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
        *("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps"),
        *("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor", "tie_word_embeddings"),
        *("attention_bias", "mlp_bias", "hidden_act", "bos_token_id", "eos_token_id"),
        *("sliding_window", "use_sliding_window", "max_window_layers", "layer_types"),
        "original_max_position_embeddings",
        *("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"),
        *("no_rope_layers", "no_rope_layer_interval", "attention_out_bias"),
    ),
    **_no_effect(
        "what a call returns, not what it computes",
        *("output_hidden_states", "output_attentions", "return_dict", "use_cache", "torchscript"),
    ),
    **_no_effect(
        "training only",
        "residual_dropout",
        "resid_pdrop",
        "embd_pdrop",
        "attention_dropout",
        "initializer_range",
        "problem_type",
        "id2label",
        "label2id",
        "pruned_heads",
    ),
    **_no_effect("the dtype is the caller's choice", "dtype", "torch_dtype"),
    **_no_effect("padding is never computed here", "pad_token_id"),
    **_no_effect("how a product was once cut; the sum is the same", "pretraining_tp", "chunk_size_feed_forward"),
    **_no_effect("a note", "transformers_version", "_name_or_path", "auto_map"),
    **_read("quantization_config"),
    **_refused(
        compression_config="use the float weights, or a GGUF file",
        is_encoder_decoder="decoders are",
        add_cross_attention="decoders are",
        attn_logit_softcapping="no network here caps its scores",
        final_logit_softcapping="no network here caps its logits",
    ),
    "is_causal": Key("refused", "attention to later tokens is not", (None, True)),
}

# generation_config.json, and the same keys in a config.json of transformers 4
_OWN = "a request brings its own sampling parameters"
GENERATION_KEYS: dict[str, Key] = {
    **_read("eos_token_id"),
    **_no_effect(
        _OWN,
        *("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "top_h", "epsilon_cutoff", "eta_cutoff"),
        *("repetition_penalty", "max_length", "max_new_tokens", "min_length", "min_new_tokens", "max_time"),
        *("num_beams", "num_beam_groups", "diversity_penalty", "length_penalty", "early_stopping"),
        *("num_return_sequences", "penalty_alpha", "remove_invalid_values", "renormalize_logits"),
    ),
    **_no_effect("the tokenizer says what stands before a text", "bos_token_id"),
    **_no_effect("padding is never computed here", "pad_token_id"),
    **_no_effect("encoders and decoders only", "decoder_start_token_id", "encoder_repetition_penalty"),
    **_no_effect("encoders and decoders only", "encoder_no_repeat_ngram_size"),
    **_no_effect(
        "how transformers computes, not what",
        *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size", "low_memory"),
        *("compile_config", "disable_compile", "continuous_batching_config", "is_assistant", "num_assistant_tokens"),
        *("num_assistant_tokens_schedule", "assistant_confidence_threshold", "assistant_early_exit"),
        *("assistant_ensemble_weight", "assistant_lookbehind", "target_lookbehind", "prompt_lookup_num_tokens"),
        *("max_matching_ngram_size", "speculation_type", "use_mtp"),
    ),
    **_no_effect(
        "what a call returns, not what it computes",
        *("output_attentions", "output_hidden_states", "output_logits", "output_scores", "return_dict_in_generate"),
    ),
    **_no_effect("a note", "transformers_version", "_from_model_config"),
    **{
        name: Key("warned", "give a request what it needs of this")
        for name in (
            *(
                "bad_words_ids",
                "begin_suppress_tokens",
                "constraints",
                "dola_layers",
                "exponential_decay_length_penalty",
            ),
            *("force_words_ids", "forced_bos_token_id", "forced_eos_token_id", "no_repeat_ngram_size", "sequence_bias"),
            *("stop_strings", "suppress_tokens", "token_healing", "watermarking_config"),
        )
    },
    "guidance_scale": Key("warned", "classifier-free guidance is not supported", (None, 1)),
}

# tokenizer_config.json and special_tokens_map.json
TOKENIZER_KEYS: dict[str, Key] = {
    **_read("bos_token", "eos_token", "unk_token", "pad_token", "chat_template", "add_bos_token", "add_eos_token"),
    **_read(
        "added_tokens_decoder", "additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens"
    ),
    **_no_effect("tokenizer.json has the last word", "add_prefix_space", "legacy", "tokenizer_class", "use_fast"),
    **_no_effect("tokenizer.json has the last word", "sp_model_kwargs", "vocab_file", "merges_file", "tokenizer_file"),
    **_no_effect("the context is the network's", "model_max_length", "max_len"),
    **_no_effect("padding is never computed here", "padding_side", "pad_to_multiple_of", "pad_token_type_id"),
    **_no_effect("prompts are refused, not cut", "truncation_side", "stride", "truncation_strategy", "max_length"),
    **_no_effect(
        "token bytes are exact here; only transformers' decode removes spaces", "clean_up_tokenization_spaces"
    ),
    **_no_effect("token bytes are exact here", "spaces_between_special_tokens", "errors"),
    **_no_effect("not of decoders that generate text", "sep_token", "cls_token", "mask_token", "model_input_names"),
    **_no_effect(
        "a note", "name_or_path", "special_tokens_map_file", "processor_class", "auto_map", "backend", "is_local"
    ),
    **_no_effect("templates say it themselves", "use_default_system_prompt", "response_template", "response_schema"),
    **_no_effect("what a user types is never marked apart", "chat_control_tokens"),
    **_no_effect(
        "token bytes are exact here", "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
    ),
    **_no_effect("padding and truncation are never applied here", "tokenizer_padding", "tokenizer_truncation"),
    **_no_effect("tokenizer.json has the last word", "vocab", "merges", "unk_id", "post_processor"),
    **_no_effect("what a class is made with, in no file that it saves", "init_inputs", "files_loaded", "verbose"),
    "fast_tokenizer_files": Key(
        "warned", "tokenizer.json is read, whatever the version", (None, [], ["tokenizer.json"])
    ),
    "fix_mistral_regex": Key("warned", "the pre-tokenizer of tokenizer.json stands"),
    "split_special_tokens": Key("refused", "special tokens in a text are read as tokens"),
}

# rope_parameters and rope_scaling
ROPE_KEYS: dict[str, Key] = {
    **_read("rope_type", "type", "rope_theta", "partial_rotary_factor", "factor"),
    **_read("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    **_read("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate", "short_factor"),
    **_no_effect("the context ends where the long factors would begin", "long_factor"),
}

# GGUF: general.* and split.*
GENERAL_KEYS: dict[str, Key] = {
    **_read("general.architecture", "general.alignment", "general.name", "split.count", "split.no"),
    "general.type": Key("refused", "a file of type model is", (None, "model")),
    **_no_effect("counted again from the table of tensors", "split.tensors.count"),
    **_no_effect("each tensor says how it is quantized", "general.quantization_version", "general.file_type"),
    **_no_effect(
        _OWN,
        *(
            f"general.sampling.{name}"
            for name in (
                *("sequence", "top_k", "top_p", "min_p", "xtc_probability", "xtc_threshold", "temp"),
                *("penalty_last_n", "penalty_repeat", "mirostat", "mirostat_tau", "mirostat_eta"),
            )
        ),
    ),
}
# general.*, or the beginning of one: notes that no computation uses.
GENERAL_NOTES = (
    *(
        "author",
        "version",
        "organization",
        "finetune",
        "basename",
        "description",
        "quantized_by",
        "size_label",
        "license",
    ),
    *("url", "doi", "uuid", "repo_url", "source", "base_model", "dataset", "tags", "languages"),
)

# GGUF: keys behind the architecture's name
ARCHITECTURE_KEYS: dict[str, Key] = {
    **_read("vocab_size", "context_length", "embedding_length", "block_count", "feed_forward_length"),
    **_read("attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length"),
    **_read("attention.layer_norm_rms_epsilon", "rope.dimension_count", "rope.freq_base"),
    **_read("rope.scaling.type", "rope.scaling.factor", "rope.scale_linear"),
    **_read("rope.scaling.original_context_length", "rope.scaling.attn_factor"),
    **{
        f"rope.scaling.{name}": READ
        for name in ("yarn_ext_factor", "yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow")
    },
    **_no_effect("a note", "tensor_data_layout", "rope.scaling.finetuned"),
    **_no_effect("for embeddings only", "pooling_type"),
    **_no_effect("of other norms", "attention.layer_norm_epsilon", "attention.group_norm_epsilon"),
    **_no_effect("of other norms", "attention.group_norm_groups"),
    "attention.causal": Key("refused", "attention to later tokens is not", (None, True)),
    **{
        name: Key("refused", f"it asks for {what}")
        for what, names in {
            "a mixture of experts": (
                *("expert_count", "expert_used_count", "expert_shared_count", "expert_group_count"),
                *("expert_group_used_count", "expert_weights_scale", "expert_weights_norm", "expert_gating_func"),
                *("expert_group_scale", "experts_per_group", "expert_feed_forward_length", "moe_every_n_layers"),
                *("expert_shared_feed_forward_length", "expert_chunk_feed_forward_length", "moe_latent_size"),
                *("leading_dense_block_count", "interleave_moe_layer_step", "swiglu_clamp_exp", "swiglu_clamp_shexp"),
            ),
            "sliding-window attention": (
                *("attention.sliding_window", "attention.sliding_window_pattern", "attention.key_length_swa"),
                *("attention.value_length_swa", "rope.dimension_count_swa", "rope.freq_base_swa"),
            ),
            "its own attention scale": (
                *("attention.scale", "attention.output_scale", "attention.temperature_length"),
                *("attention.temperature_scale", "attn_logit_softcapping"),
            ),
            "another attention": (
                *("attention.max_alibi_bias", "attention.clamp_kqv", "attention.q_lora_rank", "attention.kv_lora_rank"),
                *("attention.decay_lora_rank", "attention.iclr_lora_rank", "attention.value_residual_mix_lora_rank"),
                *("attention.gate_lora_rank", "attention.relative_buckets_count", "attention.key_length_mla"),
                *("attention.value_length_mla", "attention.shared_kv_layers", "full_attention_interval"),
            ),
            "its own scales of hidden states or logits": (
                *("logit_scale", "residual_scale", "embedding_scale", "final_logit_softcapping"),
                *("router_logit_softcapping", "activation_sparsity_scale"),
            ),
            "another rope": ("rope.dimension_sections", "rope.scaling.alpha", "rope.scaling.yarn_log_multiplier"),
            "another network": (
                *("use_parallel_residual", "nextn_predict_layers", "n_deepstack_layers", "decoder_start_token_id"),
                *("decoder_block_count", "swin_norm", "rescale_every_n_layers", "time_mix_extra_dim"),
                *("time_decay_extra_dim", "token_shift_count", "altup.active_idx", "altup.num_inputs"),
                *("embedding_length_per_layer_input", "embedding_length_out", "features_length"),
                *("{dense}_feat_in", "{dense}_feat_out"),
            ),
        }.items()
        for name in names
    },
}

# GGUF: tokenizer.*
GGUF_TOKENIZER_KEYS: dict[str, Key] = {
    **_read(*(f"tokenizer.ggml.{name}" for name in ("model", "pre", "tokens", "token_type", "scores", "merges"))),
    **_read(*(f"tokenizer.ggml.{name}_token_id" for name in ("bos", "eos", "eot", "eom", "unknown", "padding"))),
    **_read(*(f"tokenizer.ggml.{name}" for name in ("add_bos_token", "add_eos_token", "add_space_prefix"))),
    **_read("tokenizer.chat_template", "tokenizer.ggml.fim_pad_token_id", "tokenizer.ggml.fim_rep_token_id"),
    **_read("tokenizer.ggml.fim_sep_token_id"),
    **_no_effect(
        "not of the two kinds that are read",
        *("tokenizer.ggml.token_type_count", "tokenizer.ggml.seperator_token_id", "tokenizer.ggml.mask_token_id"),
        *("tokenizer.ggml.add_sep_token", "tokenizer.rwkv.world"),
    ),
    **_no_effect("llama.cpp reads the tokens themselves", "tokenizer.huggingface.json"),
    **_no_effect(
        "other templates are chosen by name only", "tokenizer.chat_template.{name}", "tokenizer.chat_templates"
    ),
    **{
        f"tokenizer.ggml.{name}_token_id": Key("no effect", "filling in the middle is not a request's")
        for name in ("fim_pre", "fim_suf", "fim_mid", "prefix", "suffix", "middle")
    },
    "tokenizer.ggml.remove_extra_whitespaces": Key("refused", "texts are taken as they are"),
    "tokenizer.ggml.precompiled_charsmap": Key("refused", "texts are taken as they are"),
}
