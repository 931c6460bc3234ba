"""OneFormer (Jain et al. 2023), as its authors published it: one network that is told in a text which task to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera.models.backbone import build_backbone
from tessera.models.base import Network
from tessera.models.common import checkpointing
from tessera.models.common.attention import Attention, full_precision
from tessera.models.common.masked_decoder import MLP, MaskedDecoder, mask_outputs
from tessera.models.common.pixel_decoder import PixelDecoder
from tessera.models.common.position import sine_position
from tessera.models.oneformer.text import TextEncoder, image_texts, task_input, tokenize
from tessera.spec.networks import ClassDecoderSpec, OneFormerSpec
from tessera.structures import Batch


class OneFormer(Network):
    """``pred_logits`` (B, Q, classes + 1), no-object last, and ``pred_masks`` (B, Q, H/4, W/4), logits.

    ``task`` (B, task_length) float32 is the zero-padded token ids of the task's text. In training ``texts`` (B, T, L) int64, the tokens of
    what the images hold, go in too, and ``queries`` (B, Q, C), ``texts`` (B, Q, C) and ``logit_scale`` come out for the contrastive loss.
    Padding is not masked, as published.
    """

    input_names = ("images", "task")
    output_names = ("pred_logits", "pred_masks")

    def __init__(
        self,
        spec: OneFormerSpec,
        class_names: Sequence[str],
        activation_checkpoint: bool = False,
        load_pretrained: bool = True,
    ) -> None:
        super().__init__(spec.pixel_mean, spec.pixel_std)
        dim = spec.pixel_decoder.hidden_dim
        self.spec = spec
        self.class_names = tuple(class_names)
        self.backbone = build_backbone(spec.backbone, activation_checkpoint, load_pretrained)
        self.pixel_decoder = PixelDecoder(self.backbone.channels, spec.pixel_decoder, activation_checkpoint)
        self.task_mlp = MLP(spec.task_length, dim, dim, layers=2)
        self.query_embed = nn.Embedding(spec.decoder.num_object_queries, dim)
        self.class_decoder = ClassDecoder(dim, spec.class_decoder, spec.decoder.pre_norm, activation_checkpoint)
        self.decoder = MaskedDecoder(dim, len(self.class_names), spec.decoder, activation_checkpoint)
        self.text: TextEncoder | None = None
        if spec.loss.contrastive_weight:
            self.text = TextEncoder(spec.text, dim, spec.loss.contrastive_temperature, activation_checkpoint)

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """A batch that names no tasks is asked the task of the mode."""
        tasks = batch.tasks or [self.spec.mode] * len(batch.metas)
        device = batch.images.device
        found = super().inputs(batch)
        found["task"] = torch.stack([task_input(self.spec, task) for task in tasks]).to(device)
        if self.training and self.text is not None and batch.targets is not None:
            length = self.spec.text.context_length
            count = self.spec.decoder.num_object_queries - self.spec.text.num_context
            texts = [
                torch.stack([tokenize(text, length) for text in image_texts(target, task, self.class_names, count)])
                for target, task in zip(batch.targets, tasks, strict=True)
            ]
            found["texts"] = torch.stack(texts).to(device)
        return found

    def forward(
        self, images: Tensor, padding: Tensor | None = None, task: Tensor | None = None, texts: Tensor | None = None
    ) -> dict[str, Any]:
        if task is None:
            raise ValueError("OneFormer needs the tokens of a task beside the images")
        pixels = self.pixel_decoder(self.backbone(self.normalise(images)))
        with full_precision(images):
            # Token ids are numbers up to 49407, sums of which fp16 does not hold.
            token = self.task_mlp(task.float()).unsqueeze(1)
        if self.spec.use_task_norm:
            token = self.decoder.heads.norm(token)
        content = token if self.spec.use_task_norm else torch.zeros_like(token)
        queries = self.class_decoder(content, self.query_embed.weight[:-1], pixels.mask_features)
        queries = torch.cat((queries, token.to(queries.dtype)), dim=1)
        *earlier, last = self.decoder(queries, self.query_embed.weight, pixels)
        outputs: dict[str, Any] = mask_outputs(last, pixels.mask_features)
        if self.training:
            if self.spec.loss.deep_supervision:
                outputs["aux"] = [mask_outputs(prediction, pixels.mask_features) for prediction in earlier]
            if self.text is not None and texts is not None:
                outputs["queries"] = queries
                outputs["texts"], outputs["logit_scale"] = self.text(texts)
        return outputs


class ClassDecoder(nn.Module):
    """Makes the queries from the task token, which looks at the image through a DETR decoder.

    As published, what the queries gather are the position encodings of pixels, chosen by position and projected feature.
    """

    def __init__(self, dim: int, spec: ClassDecoderSpec, pre_norm: bool, activation_checkpoint: bool = False) -> None:
        super().__init__()
        self.activation_checkpoint = activation_checkpoint
        self.input_proj = nn.Conv2d(dim, dim, kernel_size=1)
        self.layers = nn.ModuleList(ClassDecoderLayer(dim, spec, pre_norm) for _ in range(spec.layers))
        self.norm = nn.LayerNorm(dim)
        nn.init.xavier_uniform_(self.input_proj.weight)
        assert self.input_proj.bias is not None
        nn.init.zeros_(self.input_proj.bias)

    def forward(self, content: Tensor, query_position: Tensor, mask_features: Tensor) -> Tensor:
        """content (B, 1, C), the same for all queries at first; query_position (Q, C); mask_features (B, C, h, w). Returns (B, Q, C)."""
        batch, channels, height, width = mask_features.shape
        position = sine_position(height, width, channels, mask_features)
        keys = position + self.input_proj(mask_features).flatten(2).transpose(1, 2)
        values = position.expand(batch, -1, -1)
        x = content.expand(-1, len(query_position), -1)
        for layer in self.layers:
            x = checkpointing.run(layer, x, query_position, keys, values, recompute=self.activation_checkpoint)
        out: Tensor = self.norm(x)
        return out


class ClassDecoderLayer(nn.Module):
    """Self-attention, cross-attention, feed-forward; normalised after each, or before each with ``pre_norm``."""

    def __init__(self, dim: int, spec: ClassDecoderSpec, pre_norm: bool) -> None:
        super().__init__()
        self.pre_norm = pre_norm
        self.self_attn = Attention(dim, spec.nheads, spec.dropout)
        self.norm1 = nn.LayerNorm(dim)
        self.cross_attn = Attention(dim, spec.nheads, spec.dropout)
        self.norm2 = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, spec.dim_feedforward)
        self.linear2 = nn.Linear(spec.dim_feedforward, dim)
        self.norm3 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(spec.dropout)
        nn.init.xavier_uniform_(self.linear1.weight)
        nn.init.xavier_uniform_(self.linear2.weight)

    def forward(self, x: Tensor, query_position: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """x (B, Q, C); query_position (Q, C); keys and values (B, S, C)."""
        if self.pre_norm:
            y = self.norm1(x)
            x = x + self.dropout(self.self_attn(y + query_position, y + query_position, y))
            x = x + self.dropout(self.cross_attn(self.norm2(x) + query_position, keys, values))
            x = x + self.dropout(self._feed_forward(self.norm3(x)))
            return x
        y = x + query_position
        x = self.norm1(x + self.dropout(self.self_attn(y, y, x)))
        x = self.norm2(x + self.dropout(self.cross_attn(x + query_position, keys, values)))
        x = self.norm3(x + self.dropout(self._feed_forward(x)))
        return x

    def _feed_forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear2(self.dropout(F.relu(self.linear1(x))))
        return out
