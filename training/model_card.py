"""README.md of an exported model, in the hub's format: what it is, how it was trained, how to use it."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

import tomli_w
import torch

from model.checkpoint import Provenance
from model.config import ModelConfig, count_parameters
from model.hf_config import MODEL_CLASSES
from model.tokenizer import Tokenizer

CARD_FILE = "README.md"
# What a recipe says about the machine it ran on and about logging is nobody else's business.
_LEFT_OUT = {"data": ("dir", "tokenizer"), "model": ("init_from",), "train": ("device",), "run": None}

_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
---

# {name}

A {class_name} of {parameters:,} parameters, exported by Quill.

| | |
|---|---|
{facts}
{recipe}
## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
inputs = tokenizer("...", return_tensors="pt", return_token_type_ids=False)  # your text
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64, do_sample=True)[0]))
```

It is served by `python -m server --model {name}`.
"""


@dataclass(frozen=True, slots=True)
class ModelCard:
    """`config` is the model's as exported; `recipe` is a run's config.toml."""

    name: str
    config: ModelConfig
    tokenizer: Tokenizer
    dtype: torch.dtype
    provenance: Provenance
    recipe: str | None = None

    def text(self) -> str:
        classes = {architecture: name for name, architecture in MODEL_CLASSES.items()}
        facts = "\n".join(f"| {label} | {value} |" for label, value in [*self._model_facts(), *self._training_facts()])
        recipe = f"\n## Recipe\n\n```toml\n{public_recipe(self.recipe)}```\n" if self.recipe is not None else ""
        return _CARD.format(
            name=self.name, class_name=classes[self.config.architecture], facts=facts, recipe=recipe,
            parameters=count_parameters(self.config),
        )  # fmt: skip

    def _model_facts(self) -> list[tuple[str, str]]:
        config = self.config
        heads = f"{config.num_heads} heads of {config.head_dim}"
        if config.num_kv_heads != config.num_heads:
            heads += f" over {config.num_kv_heads} of keys and values"
        return [
            ("layers", f"{config.num_layers}, hidden size {config.hidden_size}, {heads}"),
            ("context", f"{config.max_seq_len:,} tokens"),
            ("vocabulary", f"{config.vocab_size:,} tokens ({self.tokenizer.kind.replace('_', ' ')})"),
            ("weights", str(self.dtype).removeprefix("torch.")),
        ]

    def _training_facts(self) -> list[tuple[str, str]]:
        """Of the manifest: only what is known."""
        facts = self.provenance
        known = [
            ("training steps", facts.step, "{:,}"),
            ("validation loss", facts.validation_loss, "{:.4f} nats per token"),
            ("bits per byte", facts.bits_per_byte, "{:.4f}"),
            ("run", facts.run, "`{}`"),
            ("data", facts.data, "`{}`"),
            ("started from", facts.parent, "`{}`"),
        ]
        return [(label, form.format(value)) for label, value, form in known if value is not None]


def public_recipe(text: str) -> str:
    """A recipe without the paths and settings of the machine it ran on."""
    kept = {
        section: {key: value for key, value in values.items() if key not in (_LEFT_OUT.get(section) or ())}
        for section, values in tomllib.loads(text).items()
        if _LEFT_OUT.get(section, ()) is not None
    }
    return tomli_w.dumps({section: values for section, values in kept.items() if values})


def read_recipe(path: Path) -> str | None:
    """The text of a run's config.toml, or None where there is none that can be read."""
    try:
        text = path.read_text(encoding="utf-8")
        tomllib.loads(text)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError):
        return None
    return text
