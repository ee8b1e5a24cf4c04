"""The structures of decoder.c, field for field."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p


def _fields(text: str, kind: type) -> list[tuple[str, type]]:
    return [(name, kind) for name in text.split()]


class Matrix(ctypes.Structure):
    """`matrix`"""

    _fields_ = [*_fields("weights starts scales bias", c_void_p), *_fields("panels steps groups", c_int64)]


class Norm(ctypes.Structure):
    """`norm`"""

    _fields_ = _fields("scale bias", c_void_p)


class Layer(ctypes.Structure):
    """`layer`"""

    _fields_ = [
        *_fields("qkv o up down", Matrix),
        *_fields("attn_norm mlp_norm", Norm),
        *_fields("q_norm k_norm key_cache value_cache", c_void_p),
    ]


class Decoder(ctypes.Structure):
    """`decoder`"""

    _fields_ = [
        ("layers", c_void_p),
        ("head", Matrix),
        ("final_norm", Norm),
        *_fields("embedding position_table cosine sine x input qkv attended inner", c_void_p),
        *_fields("bytes row_scales row_starts", c_void_p),
        *_fields("num_layers hidden_size hidden_stride qkv_stride q_size inner_stride bytes_stride", c_int64),
        *_fields("angle_stride vocab_size max_seq_len num_heads num_kv_heads head_dim", c_int64),
        *_fields("block_size window max_rows", c_int64),
        ("norm_eps", c_float),
        *_fields("weights is_rms_norm is_norm_first is_gated activation", c_int32),
    ]


class DecoderStep(ctypes.Structure):
    """`decoder_step`"""

    _fields_ = [
        *_fields("input_ids positions rows cu_seqlens_q context_lens block_tables output", c_void_p),
        *_fields("num_tokens num_rows num_seqs max_blocks", c_int64),
        ("num_threads", c_int32),
    ]


class Packing(ctypes.Structure):
    """`packing`"""

    _fields_ = [
        *_fields("source order packed scales sizes", c_void_p),
        *_fields("columns panels steps groups stride", c_int64),
        *_fields("weights is_bfloat16 num_threads", c_int32),
    ]


STRUCTURES = (Decoder, Layer, DecoderStep, Packing)
"""In the order of `quill_decoder_sizes`."""
