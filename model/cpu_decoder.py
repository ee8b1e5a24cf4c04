"""CPUDecoder: a Transformer's weights packed for this CPU, and its forward pass as one call into model/native.

A row's results do not depend, to the bit, on what else is in the step: see model/native/decoder.c.
"""

from __future__ import annotations

import ctypes
from typing import cast

import torch
from torch import Tensor, nn

from model.attention_cpu import NativeBackend
from model.config import ModelConfig
from model.errors import ConfigError
from model.kv_cache import PagedKVCache
from model.layers import GatedMLP, LayerNorm, RMSNorm
from model.linear import Linear
from model.native import load_kernels
from model.native.decoder_structs import Decoder, DecoderStep, Layer, Matrix, Norm, Packing
from model.paged_attention import AttentionMetadata
from model.transformer import Transformer, TransformerBlock

PANEL = 32
"""Output features that are packed side by side; all widths are padded to it."""
GROUP = 128
"""Inputs that share one scale in eight bits."""
_MAX_HEAD_DIM = 512
_WEIGHTS = {torch.float32: 0, torch.bfloat16: 1}
_INT8 = 2
_INPUTS_PER_STEP = (1, 2, 4)  # what fits into 32 bits
_ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "gelu": 2, "relu": 3}
_HUGE_PAGE = 2 << 20
_NO_MEMORY = -1
_COMPACT_HEADER = 128
# Unpacking takes time too.
_WORTH_COMPACTING = 0.95


class CPUDecoder:
    """Takes a model's weights over: afterwards the Transformer that they came from is empty.

    `forward` gives the hidden states of chosen rows of a step, `logits` their logits. One instance serves one thread
    and one cache, whose blocks must have NativeBackend's layout.
    """

    def __init__(self, model: Transformer, max_rows: int, quantization: str = "none") -> None:
        """`max_rows` bounds the tokens of a step; `quantization` is none or int8.

        Raises ConfigError where `supports` says no.
        """
        library = load_kernels()
        if library is None or not self.supports(model.config, model.dtype):
            raise ConfigError("the compiled CPU kernels cannot run this model")
        self.config, self.dtype = model.config, model.dtype
        self._library = library
        self._weights = _INT8 if quantization == "int8" else _WEIGHTS[self.dtype]
        self._alive: list[object] = []  # what the structures point to
        self._decoder = Decoder()
        self._workspace: list[Tensor] = []
        self._slots: Tensor | None = None  # where weights are packed before they are brought together
        self._describe()
        self._take_weights(model)
        self._slots = None
        self.reserve(max_rows)

    @staticmethod
    def supports(config: ModelConfig, dtype: torch.dtype) -> bool:
        """Whether the kernels were built and cover the model; int8 weights need bfloat16 beside them."""
        return NativeBackend.supports(config, dtype) and config.head_dim <= _MAX_HEAD_DIM

    @staticmethod
    def is_fastest() -> bool:
        """Not where the CPU multiplies whole matrices in hardware (AMX): oneDNN uses that, these kernels do not."""
        return not torch.cpu._is_amx_tile_supported()

    @property
    def tile_rows(self) -> int:
        """So many rows share one pass over the weights."""
        return int(self._library.quill_tile_rows(self._weights))

    def bind(self, cache: PagedKVCache) -> None:
        """Use `cache` from now on."""
        for layer, keys, values in zip(self._layers, cache.keys, cache.values, strict=True):
            layer.key_cache, layer.value_cache = keys.data_ptr(), values.data_ptr()
        self._decoder.block_size = cache.block_size
        self._cache = cache

    def reserve(self, max_rows: int) -> None:
        """Make room for steps of so many tokens. Padding is read, so all is zero; pages are taken as rows need them."""
        decoder = self._decoder
        if max_rows <= decoder.max_rows:
            return
        decoder.max_rows, self._workspace = max_rows, []
        decoder.x = self._allocate(decoder.hidden_stride, torch.float32)
        decoder.input = self._allocate(decoder.hidden_stride, self.dtype)
        decoder.qkv = self._allocate(decoder.qkv_stride, self.dtype)
        decoder.attended = self._allocate(decoder.q_size, self.dtype)
        decoder.inner = self._allocate(decoder.inner_stride, self.dtype)
        if self._weights == _INT8:
            widest = max(self.config.hidden_size, self.config.intermediate_size, decoder.q_size)
            decoder.bytes_stride = _padded(widest)
            decoder.bytes = self._allocate(decoder.bytes_stride, torch.int8)
            decoder.row_scales = self._allocate(-(-widest // GROUP), torch.float32)
            decoder.row_starts = self._allocate(-(-widest // GROUP), torch.int32)

    def _allocate(self, width: int, dtype: torch.dtype) -> int:
        # Vector loads may reach past the last row's end.
        self._workspace.append(torch.zeros(self._decoder.max_rows * width + PANEL, dtype=dtype))
        return self._workspace[-1].data_ptr()

    def forward(self, input_ids: Tensor, positions: Tensor, metadata: AttentionMetadata, rows: Tensor) -> Tensor:
        """Write the keys and values of input_ids [N] at positions [N], and return the hidden states [rows, D].

        `rows` int64, ascending, are places among the N tokens; tokens beyond `metadata.num_tokens` are padding.
        """
        num_rows = rows.shape[0]
        hidden = torch.empty(num_rows, self._decoder.hidden_stride, dtype=self.dtype)
        step = DecoderStep(
            input_ids=input_ids.data_ptr(),
            positions=positions.data_ptr(),
            rows=rows.data_ptr(),
            cu_seqlens_q=metadata.cu_seqlens_q.data_ptr(),
            context_lens=metadata.context_lens.data_ptr(),
            block_tables=metadata.block_tables.data_ptr(),
            output=hidden.data_ptr(),
            num_tokens=metadata.num_tokens,
            num_rows=num_rows,
            num_seqs=metadata.context_lens.shape[0],
            max_blocks=metadata.block_tables.stride(0),
            num_threads=torch.get_num_threads(),
        )
        self._check(self._library.quill_decoder_forward(ctypes.byref(self._decoder), ctypes.byref(step)))
        return hidden[:, : self.config.hidden_size]

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [rows, V] in float32 of hidden states [rows, D] that `forward` gave."""
        num_rows, width = hidden.shape
        stride = self._decoder.hidden_stride
        if hidden.stride() != (stride, 1) and num_rows > 0:
            padded = hidden.new_zeros(num_rows, stride)
            padded[:, :width] = hidden
            hidden = padded
        logits = torch.empty(num_rows, self._decoder.head.panels * PANEL)
        step = DecoderStep(output=hidden.data_ptr(), num_rows=num_rows, num_threads=torch.get_num_threads())
        status = self._library.quill_decoder_logits(ctypes.byref(self._decoder), ctypes.byref(step), logits.data_ptr())
        self._check(status)
        return logits[:, : self.config.vocab_size]

    @staticmethod
    def _check(status: int) -> None:
        if status == _NO_MEMORY:
            raise MemoryError("no memory for the kernels' workspace")
        assert status == 0, "a step must fit the model: ids, positions, ascending rows, at most max_rows tokens"

    def _describe(self) -> None:
        config, decoder = self.config, self._decoder
        decoder.num_layers, decoder.hidden_size = config.num_layers, config.hidden_size
        decoder.hidden_stride = _padded(config.hidden_size)
        decoder.qkv_stride, decoder.q_size = _padded(config.q_size + 2 * config.kv_size), config.q_size
        decoder.inner_stride = _padded(config.intermediate_size)
        decoder.vocab_size, decoder.max_seq_len = config.vocab_size, config.max_seq_len
        decoder.num_heads, decoder.num_kv_heads = config.num_heads, config.num_kv_heads
        decoder.head_dim, decoder.window = config.head_dim, config.sliding_window or 0
        decoder.norm_eps, decoder.weights = config.norm_eps, self._weights
        decoder.is_rms_norm, decoder.is_norm_first = config.norm == "rmsnorm", config.norm_first
        decoder.is_gated, decoder.activation = config.gated_mlp, _ACTIVATIONS[config.activation]

    def _take_weights(self, model: Transformer) -> None:
        decoder, config = self._decoder, self.config
        self._layers = (Layer * config.num_layers)()
        decoder.layers = ctypes.cast(self._layers, ctypes.c_void_p)
        for index, layer in enumerate(self._layers):
            block = cast(TransformerBlock, model.layers[index])
            attn, mlp = block.attn, block.mlp
            layer.qkv, layer.o = self._pack(attn.qkv_proj), self._pack(attn.o_proj)
            if isinstance(mlp, GatedMLP):
                layer.up = self._pack(mlp.gate_up_proj, _interleave(config.intermediate_size))
            else:
                layer.up = self._pack(mlp.up_proj)
            layer.down = self._pack(mlp.down_proj)
            layer.attn_norm, layer.mlp_norm = self._norm(block.attn_norm), self._norm(block.mlp_norm)
            if attn.q_norm is not None and attn.k_norm is not None:
                layer.q_norm = self._keep(attn.q_norm.weight.detach().float())
                layer.k_norm = self._keep(attn.k_norm.weight.detach().float())
        if model.final_norm is not None:
            decoder.final_norm = self._norm(model.final_norm)
        self._take_tables(model)

    def _take_tables(self, model: Transformer) -> None:
        decoder = self._decoder
        if model.lm_head is not None:
            decoder.head = self._pack(model.lm_head)
            decoder.embedding = self._keep(self._pad_columns(model.embed_tokens.weight.detach()))
        else:
            decoder.head = self._pack_weight(model.embed_tokens.weight.detach(), None, None)
        _empty(model.embed_tokens)
        if model.embed_positions is not None:
            decoder.position_table = self._keep(self._pad_columns(model.embed_positions.weight.detach()))
            _empty(model.embed_positions)
        if model.rotary is not None:
            positions = torch.arange(self.config.max_seq_len)
            half = self.config.head_dim // 2
            cosine, sine = (_pad(table[:, 0, :half], 16) for table in model.rotary(positions))
            decoder.cosine, decoder.sine = self._keep(cosine), self._keep(sine)
            decoder.angle_stride = cosine.shape[1]

    def _pack(self, linear: Linear, order: Tensor | None = None) -> Matrix:
        matrix = self._pack_weight(linear.weight.detach(), linear.bias, order)
        _empty(linear)
        return matrix

    def _pack_weight(self, weight: Tensor, bias: Tensor | None, order: Tensor | None) -> Matrix:
        """`order` names the source of every packed feature, -1 for none; by default as they are."""
        features, columns = weight.shape
        if order is None:
            order = torch.arange(_padded(features))
            order[features:] = -1
        panels = order.numel() // PANEL
        steps = -(-columns // _INPUTS_PER_STEP[self._weights])
        groups = -(-columns // GROUP)
        scales = torch.zeros(panels * groups * PANEL) if self._weights == _INT8 else None
        source = weight.contiguous()
        call = Packing(
            source=source.data_ptr(),
            order=order.data_ptr(),
            scales=None if scales is None else scales.data_ptr(),
            columns=columns,
            panels=panels,
            steps=steps,
            groups=groups,
            weights=self._weights,
            is_bfloat16=weight.dtype == torch.bfloat16,
            num_threads=torch.get_num_threads(),
        )
        packed, starts = self._lay_out(call)
        return Matrix(
            weights=self._keep(packed),
            starts=None if starts is None else self._keep(starts),
            scales=None if scales is None else self._keep(scales),
            bias=None if bias is None else self._keep(_reorder(bias.detach().float(), order)),
            panels=panels,
            steps=steps,
            groups=groups,
        )

    def _lay_out(self, call: Packing) -> tuple[Tensor, Tensor | None]:
        """The packed weights, and with compact ones where each panel begins, in bytes."""
        if self._weights == _WEIGHTS[torch.bfloat16] and self._library.quill_reads_compact():
            compact = self._lay_out_compact(call)
            if compact is not None:
                return compact
        packed = _huge(call.panels * call.steps * PANEL)
        call.packed, call.sizes = packed.data_ptr(), None
        self._library.quill_pack(ctypes.byref(call))
        return packed, None

    def _lay_out_compact(self, call: Packing) -> tuple[Tensor, Tensor] | None:
        """None where that saves next to nothing."""
        plain = call.steps * PANEL * 4
        call.stride = plain + _COMPACT_HEADER
        words = call.panels * call.stride // 4
        if self._slots is None or self._slots.numel() < words:
            self._slots = None
            self._slots = _huge(words)
        sizes = torch.empty(call.panels, dtype=torch.int64)
        call.packed, call.sizes = self._slots.data_ptr(), sizes.data_ptr()
        self._library.quill_pack(ctypes.byref(call))
        if bool((sizes < 0).any()) or int(sizes.sum()) > _WORTH_COMPACTING * plain * call.panels:
            return None
        starts = nn.functional.pad(sizes.cumsum(0), (1, 0))
        packed = _huge(int(starts[-1]) // 4)
        self._library.quill_gather(
            call.packed, call.stride, starts.data_ptr(), call.panels, packed.data_ptr(), call.num_threads
        )
        return packed, starts

    def _norm(self, norm: nn.Module) -> Norm:
        assert isinstance(norm, (LayerNorm, RMSNorm))
        bias = norm.bias if isinstance(norm, LayerNorm) else None
        return Norm(
            scale=self._keep(_pad(norm.weight.detach().float(), PANEL)),
            bias=None if bias is None else self._keep(_pad(bias.detach().float(), PANEL)),
        )

    def _pad_columns(self, table: Tensor) -> Tensor:
        return _pad(table.to(self.dtype), PANEL)

    def _keep(self, tensor: Tensor) -> int:
        """Keep a tensor as long as this decoder, and return its address."""
        tensor = tensor.contiguous()
        self._alive.append(tensor)
        return tensor.data_ptr()


def _padded(width: int, multiple: int = PANEL) -> int:
    return -(-width // multiple) * multiple


def _pad(x: Tensor, multiple: int) -> Tensor:
    """x with its last dimension filled up with zeros to a multiple."""
    missing = -x.shape[-1] % multiple
    return nn.functional.pad(x, (0, missing)) if missing else x


def _interleave(inner: int) -> Tensor:
    """Source rows of panels that hold 16 gates and the 16 values they gate, out of [gates; values]; -1 for none."""
    gates = torch.arange(_padded(inner, PANEL // 2))
    gates = gates.masked_fill_(gates >= inner, -1).view(-1, 1, PANEL // 2)
    values = torch.where(gates < 0, -1, gates + inner)
    return torch.cat((gates, values), dim=1).flatten()


def _reorder(bias: Tensor, order: Tensor) -> Tensor:
    return torch.where(order < 0, 0.0, bias[order.clamp(min=0)])


def _huge(words: int) -> Tensor:
    """[words] int32, uninitialised, on huge pages where they are to be had: a step reads all of it once."""
    size = words * 4
    memory = torch.empty(size + _HUGE_PAGE, dtype=torch.uint8)
    offset = -memory.data_ptr() % _HUGE_PAGE if size >= _HUGE_PAGE else -memory.data_ptr() % 64
    library = load_kernels()
    assert library is not None
    library.quill_huge_pages(memory.data_ptr() + offset, size)
    return memory[offset : offset + size].view(torch.int32)


def _empty(module: Linear | nn.Embedding) -> None:
    """Let go of a weight. A new tensor: a view of no rows would keep it in memory."""
    module.weight = nn.Parameter(module.weight.new_empty(0, module.weight.shape[1]), requires_grad=False)
