"""ResNet checkpoints of torchvision, timm, detectron2 and the transformers library."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from tessera.interop.published.renaming import Rules, apply

_DETECTRON2: Rules = (
    (r"^stem\.conv1\.norm\.", "bn1."),
    (r"^stem\.", ""),  # conv1, and the classifier fc of converted torchvision files
    (r"^res(\d)\.", lambda found: f"layer{int(found[1]) - 1}."),
    (r"\.conv(\d)\.norm\.", r".bn\1."),
    (r"\.shortcut\.norm\.", ".downsample.1."),
    (r"\.shortcut\.", ".downsample.0."),
)
_TRANSFORMERS: Rules = (
    (r"^resnet\.", ""),
    (r"^embedder\.embedder\.convolution\.", "conv1."),
    (r"^embedder\.embedder\.normalization\.", "bn1."),
    (r"^encoder\.stages\.(\d)\.layers\.", lambda found: f"layer{int(found[1]) + 1}."),
    (r"\.shortcut\.convolution\.", ".downsample.0."),
    (r"\.shortcut\.normalization\.", ".downsample.1."),
    (r"\.layer\.(\d)\.convolution\.", lambda found: f".conv{int(found[1]) + 1}."),
    (r"\.layer\.(\d)\.normalization\.", lambda found: f".bn{int(found[1]) + 1}."),
    (r"^classifier\.1\.", "fc."),
)


def rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """torchvision's names, which are timm's, too; unknown names stay as they are."""
    if "stem.conv1.weight" in state and any(name.startswith("res2.") for name in state):
        rules = _DETECTRON2
    elif any(name.removeprefix("resnet.").startswith("embedder.embedder.") for name in state):
        rules = _TRANSFORMERS
    else:
        return dict(state)
    return {apply(rules, name): value for name, value in state.items()}
