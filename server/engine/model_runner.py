"""ModelRunner: the weights, the cache and the sampler on one device; runs a scheduled batch."""

from __future__ import annotations

from pathlib import Path

import torch

from model.attention_cpu import NativeBackend
from model.backends import select_backend
from model.checkpoint import load_config, load_model
from model.cpu_decoder import CPUDecoder
from model.errors import ConfigError, TokenizerError
from model.fixed_shape import fix_product_shapes
from model.kv_cache import PagedKVCache, bytes_per_block
from model.packed_linear import MIN_ROWS
from model.paged_attention import PagedBatch
from model.sampling import Sampler, SamplingBatch, SamplingRow
from model.tokenizer import Tokenizer
from server.engine.config import EngineConfig
from server.engine.cuda_graph import CUDAGraphRunner
from server.engine.drawn_tokens import DrawnTokens
from server.engine.grammar_compiler import GrammarCompiler
from server.engine.grammar_masks import GrammarMasks
from server.engine.grammar_vocabulary import GrammarVocabulary
from server.engine.launched_step import LaunchedStep
from server.engine.prompt_scoring import NOTHING_SCORED, PromptScorer, Scored
from server.engine.scheduler import ScheduledBatch
from server.engine.sequence import Sequence
from server.engine.shared_cache import CacheRoom
from server.engine.sizing import device_name, resolve_device, resolve_dtype, resolve_limits, resolve_threads
from server.engine.step_inputs import InputBuilder, StepInputs


class ModelRunner:
    """Loads the checkpoint and owns everything on the device, but for the cache where it gets `room` in one.

    Raises ConfigError or CheckpointError for a folder or a setting that cannot be run.
    """

    def __init__(self, config: EngineConfig, room: CacheRoom | None = None) -> None:
        self.config = config
        folder = Path(config.model_path)
        self.device = resolve_device(config.device)
        if self.device.type == "cuda" and self.device.index is not None:
            torch.cuda.set_device(self.device)  # kernels are launched on the current device
        self.dtype = resolve_dtype(config.dtype, self.device)
        self.model_config = load_config(folder)
        self._num_threads = resolve_threads(config.num_threads, self.model_config)
        torch.set_num_threads(self._num_threads)
        self.backend = select_backend(
            config.attention_backend,
            self.model_config,
            self.device,
            self.dtype,
            config.block_size,
            deterministic=config.deterministic,
        )
        self.model = load_model(folder, dtype=self.dtype, device=self.device)
        self.num_parameters = sum(parameter.numel() for parameter in self.model.parameters())
        if config.deterministic and self.device.type == "cuda":
            fix_product_shapes(self.model)
        room = room or self._allocate_cache(config)
        self.cache, self.limits = room.cache, room.limits
        self._decoder = self._pack(config)
        self.sampler = Sampler(
            self.model_config.vocab_size,
            valid_vocab_size=_tokenizer_size(folder),
            eos_token_ids=self.model_config.eos_token_ids,
            device=self.device,
        )
        max_blocks = -(-self.limits.max_model_len // self.limits.block_size)
        self._inputs = InputBuilder(
            self.limits.max_num_seqs,
            max_blocks,
            self.limits.block_size,
            self.device,
            needs_slots=self._decoder is None,
            numbers=self.cache.numbers,
        )
        self.drawn = DrawnTokens(self.limits.max_num_seqs, self.device)
        self._scorer = PromptScorer(self.model_config.vocab_size, self.device, self.sampler)
        self._sampling: SamplingBatch | None = None
        self._sampling_key: list[int] = []
        self.grammars = GrammarCompiler(lambda: _grammar_vocabulary(folder, self.sampler.valid_vocab_size))
        self._masks = GrammarMasks(self.limits.max_num_seqs, self.sampler.valid_vocab_size, self.device)
        self._graphs = CUDAGraphRunner.create(self) if config.cuda_graphs else None

    def _allocate_cache(self, config: EngineConfig) -> CacheRoom:
        block_bytes = bytes_per_block(self.model_config, self.backend.block_shape, config.block_size, self.dtype)
        limits = resolve_limits(config, self.model_config, self.device, block_bytes)
        cache = PagedKVCache.allocate(
            self.model_config,
            self.backend.block_shape,
            num_blocks=limits.num_blocks,
            block_size=limits.block_size,
            dtype=self.dtype,
            device=self.device,
        )
        return CacheRoom(cache, limits)

    def _pack(self, config: EngineConfig) -> CPUDecoder | None:
        """On the CPU, the model's weights laid out for its kernels; None where torch's operators run it.

        Raises ConfigError if eight bits are asked for where nothing can run them.
        """
        kernels = (
            self.device.type == "cpu"
            and self.backend.name == NativeBackend.name
            and CPUDecoder.supports(self.model_config, self.dtype)
        )
        if config.quantization == "int8":
            if not kernels or self.dtype != torch.bfloat16:
                raise ConfigError("quantization int8 needs the compiled CPU kernels and dtype bfloat16; use none")
        elif config.quantization != "none":
            raise ConfigError("quantization must be none or int8")
        elif not kernels or not CPUDecoder.is_fastest():
            if self.device.type == "cpu":
                self.model.pack_for_cpu()
            return None
        decoder = CPUDecoder(self.model, max(MIN_ROWS, self.limits.max_num_batched_tokens), config.quantization)
        decoder.bind(self.cache)
        return decoder

    @property
    def max_draft_rows(self) -> int:
        """Rows of a step up to which more of them cost next to nothing; 0 where each costs."""
        return 0 if self._decoder is None else self._decoder.tile_rows

    @property
    def runs_ahead(self) -> bool:
        """Whether a step can be launched on the tokens of the one before it while that still runs."""
        wanted = self.config.overlap
        return self.device.type == "cuda" if wanted is None else wanted

    @property
    def device_name(self) -> str:
        return device_name(self.device)

    @torch.inference_mode()
    def launch(self, batch: ScheduledBatch) -> LaunchedStep:
        """Compute the batch's tokens, writing their KV; score prompts where that is asked for, and sample where a row
        reaches its sequence's end. On CUDA nothing is waited for unless prompts are scored."""
        if self._graphs is not None and self._graphs.can_replay(batch):
            return self._replay(self._graphs, batch)
        inputs = self._inputs.build(batch)
        logits, scored = self._compute(batch, inputs)
        if logits is None:
            return LaunchedStep.without_samples(scored)
        rows = zip(batch.sequences, batch.needs_sample, strict=True)
        sampled = [seq for seq, wanted in rows if wanted for _ in range(1 + len(seq.draft))]
        return self._draw(sampled, logits, inputs.sample_positions, scored)

    @torch.inference_mode()
    def compute_logits(self, batch: ScheduledBatch) -> torch.Tensor | None:
        """What `launch` samples from: logits [samples, V] that the next step may overwrite, or None without any."""
        if self._graphs is not None and self._graphs.can_replay(batch):
            return self._graphs.replay(self._inputs.decodes(batch)).logits
        return self._compute(batch, self._inputs.build(batch))[0]

    def _replay(self, graphs: CUDAGraphRunner, batch: ScheduledBatch) -> LaunchedStep:
        """A step of decodes that draws inside its graph, unless a sequence asks for more than that can."""
        replayed = graphs.replay(self._inputs.decodes(batch))
        if replayed.token_ids is None:
            return self._draw(batch.sequences, replayed.logits, replayed.sample_positions, NOTHING_SCORED)
        return LaunchedStep.begin(batch.sequences, replayed.token_ids)

    def _draw(
        self, sampled: list[Sequence], logits: torch.Tensor, positions: torch.Tensor, scored: Scored
    ) -> LaunchedStep:
        """A token for each of `sampled`, from logits [samples, V]; `positions` [samples] count those before it."""
        sampling = self._sampling_batch(sampled)
        allowed = self._masks.fill(sampled)
        output = self.sampler.sample(logits, sampling, positions, allowed)
        sampling.record(output.token_ids)
        broken = logits.gather(1, output.token_ids.clamp_min(0)[:, None]).isnan().squeeze(1)
        token_ids = output.token_ids.masked_fill(broken, -1)
        if self.runs_ahead:
            self.drawn.keep(token_ids)
        return LaunchedStep.begin(sampled, token_ids, output.logprobs, scored)

    def _compute(self, batch: ScheduledBatch, inputs: StepInputs) -> tuple[torch.Tensor | None, Scored]:
        """Logits [samples, V] of the rows that are to be sampled, or None if there are none; and what was asked about
        the prompts' tokens."""
        if torch.get_num_threads() != self._num_threads:  # another model's
            torch.set_num_threads(self._num_threads)
        if inputs.pending is not None:
            self.drawn.fill_in(inputs.input_ids, inputs.pending)
        hidden, score = self.hidden_states(inputs), inputs.score
        scored = NOTHING_SCORED
        if score is not None:
            # Before the samples' logits are made, which the next call may overwrite.
            scored = self._scorer.score(batch, self.logits, hidden.index_select(0, score.scored), score.targets)
            hidden = hidden.index_select(0, score.sampled)
        return self.logits(hidden) if len(hidden) else None, scored

    def hidden_states(self, inputs: StepInputs) -> torch.Tensor:
        """Run a step, writing its KV; the hidden states [rows, D] of `inputs.sample_rows`."""
        if self._decoder is not None:
            return self._decoder.forward(inputs.input_ids, inputs.positions, inputs.metadata, inputs.sample_rows)
        return self.forward(inputs).index_select(0, inputs.sample_rows)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [rows, V] of hidden states [rows, D]."""
        if self._decoder is not None:
            return self._decoder.logits(hidden)
        return self.model.compute_logits(hidden)

    def forward(self, inputs: StepInputs) -> torch.Tensor:
        """Hidden states [N, D] of all of a step's tokens."""
        paged = PagedBatch(self.backend, self.cache, inputs.metadata, self.model_config.sliding_window)
        return self.model.forward_paged(inputs.input_ids, inputs.positions, paged)

    def forget_sampling(self) -> None:
        """Drop what is remembered of the last batch; a step that failed half-way may have left it out of date."""
        self._sampling = None

    def _sampling_batch(self, sampled: list[Sequence]) -> SamplingBatch:
        """The parameters as tensors, built anew only when the batch's composition changes."""
        key = [seq.request_id for seq in sampled]
        if self._sampling is None or key != self._sampling_key:
            rows = [_sampling_row(seq) for seq in sampled]
            self._sampling, self._sampling_key = self.sampler.build_batch(rows), key
        return self._sampling


def _sampling_row(seq: Sequence) -> SamplingRow:
    if not seq.params.has_penalties:
        return SamplingRow(seq.params)
    return SamplingRow(seq.params, seq.token_ids[: seq.num_prompt_tokens], seq.output_token_ids)


def _tokenizer_size(folder: Path) -> int | None:
    """How many ids the folder's tokenizer knows (a model's vocabulary may be padded), or None without one."""
    try:
        return Tokenizer.load(folder).vocab_size
    except TokenizerError:
        return None


def _grammar_vocabulary(folder: Path, size: int) -> GrammarVocabulary | None:
    try:
        return GrammarVocabulary.of(Tokenizer.load(folder), size)
    except TokenizerError:
        return None
