"""The sampler: the next token of every sequence in a batch, each by its own parameters."""

from model.sampling.sampler import Sampler, SamplerOutput, SamplingBatch, SamplingRow

__all__ = ["Sampler", "SamplerOutput", "SamplingBatch", "SamplingRow"]
