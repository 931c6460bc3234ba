"""The text side of OneFormer (Jain et al. 2023, sections 3.1 and 3.2): CLIP's tokens, the texts of an image, and their encoder."""

from __future__ import annotations

import functools
import importlib.util
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tessera.files import UserError
from tessera.models.common import checkpointing
from tessera.models.common.attention import Attention
from tessera.models.common.masked_decoder import MLP
from tessera.spec.networks import OneFormerSpec, TextEncoderSpec
from tessera.structures import Target

START, END = 49406, 49407
"""Tokens around every text; ``END`` is the largest, by which the encoder finds it."""
VOCABULARY = 49408
HEAD = 64
"""Width of an attention head, as in CLIP."""
LARGEST_SCALE = 100.0
"""Of the contrastive logits, as in CLIP."""

_TASK_TEXTS = {"semantic": "a semantic photo", "instance": "an instance photo", "panoptic": "a panoptic photo"}


@functools.lru_cache(maxsize=4096)
def tokenize(text: str, length: int) -> Tensor:
    """CLIP's tokens, (length,) int64, zero-padded as published (TAO pads with ``END``); too long a text is cut and still ends with ``END``."""
    inner = _tokenizer().encode(text)[: length - 2]
    tokens = torch.zeros(length, dtype=torch.int64)
    tokens[: len(inner) + 2] = torch.tensor([START, *inner, END])
    return tokens


def tasks(spec: OneFormerSpec) -> tuple[str, ...]:
    """What a model of this mode is asked; the first fits the targets of its mode."""
    return ("panoptic", "instance", "semantic") if spec.mode == "panoptic" else (spec.mode,)


def task_input(spec: OneFormerSpec, task: str) -> Tensor:
    """(task_length,) float32: what the network reads of a task, its token ids as numbers, as published."""
    return tokenize(f"the task is {task}", spec.task_length).float()


def image_texts(target: Target, task: str, names: Sequence[str], count: int) -> list[str]:
    """``count`` texts: one for every object, in the order of the catalogue, the rest naming the task alone."""
    found = Counter(target.labels[~target.iscrowd].tolist())
    objects = [f"a photo with a {name}" for label, name in enumerate(names) for _ in range(found[label])]
    return [*objects[:count], *[_TASK_TEXTS[task]] * (count - len(objects))]


@functools.cache
def _tokenizer() -> Any:
    """CLIP's byte-pair encoder as open_clip ships it, with the vocabulary beside it. Its module is loaded alone: importing the whole
    package takes seconds and draws in whole model libraries."""
    package = importlib.util.find_spec("open_clip")
    if package is None or package.origin is None:
        raise UserError("OneFormer reads CLIP's vocabulary from the package open_clip_torch, which is not installed")
    path = Path(package.origin).with_name("tokenizer.py")
    found = importlib.util.spec_from_file_location("_tessera_clip_tokenizer", path)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module.SimpleTokenizer()


class TextEncoder(nn.Module):
    """Texts of a batch to what the queries are contrasted with. Training only: never run in evaluation, in no exported graph.

    Every distinct text is encoded once, and only up to its end, behind which a causal transformer has nothing to tell.
    """

    def __init__(
        self, spec: TextEncoderSpec, dim: int, temperature: float, activation_checkpoint: bool = False
    ) -> None:
        super().__init__()
        self.activation_checkpoint = activation_checkpoint
        self.token_embedding = nn.Embedding(VOCABULARY, spec.width)
        self.positional_embedding = nn.Parameter(torch.empty(spec.context_length, spec.width))
        self.layers = nn.ModuleList(TextLayer(spec.width, spec.layers) for _ in range(spec.layers))
        self.norm = nn.LayerNorm(spec.width)
        self.projection = MLP(spec.width, dim, dim, spec.projection_layers)
        self.context = nn.Embedding(spec.num_context, dim)
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(temperature)))
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        for layer in self.projection.layers:
            assert isinstance(layer, nn.Linear)
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, texts: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, L) int64 tokens to (B, T + num_context, dim), and the learned scale of their products with the queries."""
        batch, count, length = texts.shape
        distinct, index = torch.unique(texts.flatten(0, 1), dim=0, return_inverse=True)
        ends = distinct.argmax(1)
        tokens = distinct[:, : int(ends.max()) + 1]
        length = tokens.shape[1]
        x = self.token_embedding(tokens) + self.positional_embedding[:length]
        causal = torch.ones(length, length, dtype=torch.bool, device=x.device).tril().view(1, 1, length, length)
        for layer in self.layers:
            x = checkpointing.run(layer, x, causal, recompute=self.activation_checkpoint)
        x = self.projection(self.norm(x[torch.arange(len(x), device=x.device), ends]))
        encoded = x[index].unflatten(0, (batch, count))
        encoded = torch.cat((encoded, self.context.weight.to(x.dtype).expand(batch, -1, -1)), dim=1)
        return encoded, self.logit_scale.exp().clamp(max=LARGEST_SCALE)


class TextLayer(nn.Module):
    """CLIP's: normalised before attention and before the feed-forward layers."""

    def __init__(self, width: int, layers: int) -> None:
        """``layers`` of the whole transformer, for the initialisation."""
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, width // HEAD)
        self.norm2 = nn.LayerNorm(width)
        self.linear1 = nn.Linear(width, 4 * width)
        self.linear2 = nn.Linear(4 * width, width)
        for projection in (self.attn.q_proj, self.attn.k_proj, self.attn.v_proj):
            nn.init.normal_(projection.weight, std=width**-0.5)
        nn.init.normal_(self.linear1.weight, std=(2 * width) ** -0.5)
        for projection in (self.attn.out_proj, self.linear2):
            nn.init.normal_(projection.weight, std=(2 * layers * width) ** -0.5)

    def forward(self, x: Tensor, allowed: Tensor) -> Tensor:
        """x (N, L, C); allowed (1, 1, L, L) bool."""
        y = self.norm1(x)
        x = x + self.attn(y, y, y, allowed)
        y = self.linear1(self.norm2(x))
        out: Tensor = x + self.linear2(y * torch.sigmoid(1.702 * y))
        return out
