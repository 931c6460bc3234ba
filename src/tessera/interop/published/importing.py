"""Taking a published checkpoint over: its form is told by its names, every tensor is accounted for, and what has no reason is an error."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tessera.files import UserError, read_json
from tessera.interop.published import deformable_detr, mask2former, oneformer
from tessera.interop.published.reading import read_state, weights_file
from tessera.interop.published.renaming import few, require_fit
from tessera.spec.networks import ModelSpec
from tessera.structures import ClassCatalog

_HEAD = re.compile(r"^decoder\.(?:heads\.)?class_embed\.(?:\d+\.)?(?:weight|bias)$")
"""Our names of the class heads, whose rows are the classes."""


@dataclass(frozen=True)
class Form:
    title: str
    family: str
    marks: tuple[str, ...]
    """How a name in the file begins; one such name tells the form."""


_M2F_MARKS = ("sem_seg_head.predictor.query_feat.", "sem_seg_head.predictor.static_query.")
_OFFSETS = "encoder.layers.0.self_attn.sampling_offsets."
FORMS = (
    Form("OneFormer, original code", "oneformer", ("task_mlp.",)),
    Form("OneFormer, transformers library", "oneformer", ("model.task_encoder.",)),
    Form("Mask2Former, original code", "mask2former", _M2F_MARKS),
    Form("Mask2Former, transformers library", "mask2former", ("model.transformer_module.queries_features.",)),
    Form("Deformable DETR, original code", "deformable_detr", (f"transformer.{_OFFSETS}",)),
    Form("Deformable DETR, transformers library", "deformable_detr", (f"model.{_OFFSETS}",)),
)
RENAME = {"oneformer": oneformer.rename, "mask2former": mask2former.rename, "deformable_detr": deformable_detr.rename}

_LEFT_OUT = (
    (r"relative_position_index$", "follows from the window size"),
    (r"^criterion\.empty_weight$", "a constant of the loss (model.loss.no_object_weight)"),
    (r"encoder\.(swin\.)?layernorm\.", "the classifier's last norm, which no feature map goes through"),
    (r"(class|bbox)_embed\.\d+\.", "equal to another tensor of the file, which is kept"),
)
"""Why a renaming table leaves a tensor of the file out, by its name there."""
_UNUSED = (
    (r"^pixel_(mean|std)$", "the preprocessing, which the spec gives (model.pixel_mean, model.pixel_std)"),
    (r"^text\.", "read in training only, and model.loss.contrastive_weight is 0"),
    (r"\.num_batches_tracked$", "frozen batch norms do not count batches"),
)
"""Why a network may lack a tensor, by its name here."""
_NO_TEXTS = "read in training only, and the file was saved without it (model.loss.contrastive_weight: 0 builds none)"
_HEADS = "num_attention_heads"
_MASKED = (("pixel_decoder.nheads", _HEADS), ("decoder.nheads", _HEADS), ("decoder.pre_norm", "pre_norm"))
_UNSEEN = {
    "mask2former": _MASKED,
    "oneformer": (*_MASKED, ("class_decoder.nheads", _HEADS), ("use_task_norm", "use_task_norm")),
    "deformable_detr": (
        ("nheads", "encoder_attention_heads"),
        ("nheads", "decoder_attention_heads"),
        ("dilation", "dilation"),
        ("with_box_refine", "with_box_refine"),
    ),
}
"""Keys of `model` that change the numbers and that no tensor's shape shows, and where the transformers library's config.json says them."""


@dataclass
class Imported:
    form: Form
    state: dict[str, Tensor]
    """The network's tensors, less those that start afresh."""
    renamed: list[tuple[str, str]] = field(default_factory=list)
    """(name in the file, ours), also where they are the same; one name may have several partners where tensors are packed."""
    dropped: list[tuple[str, str]] = field(default_factory=list)
    """(name in the file, why the network does not need it)."""
    afresh: list[tuple[str, str]] = field(default_factory=list)
    """(our name, why the file does not give it)."""
    notes: list[str] = field(default_factory=list)
    """What the user has to know or to compare."""

    def describe(self, verbose: bool = False) -> str:
        """The report in a few lines; with ``verbose`` every name."""
        sources = {old for old, _ in self.renamed}
        changed = {old for old, new in self.renamed if old != new}
        lines = [
            f"{self.form.title}: {len(sources)} tensors of the file become {len(self.state)} of the network's ({len(changed)} renamed)"
        ]
        if verbose:
            width = max(len(old) for old, _ in self.renamed)
            lines += [f"  {old:<{width}}  {new}" for old, new in self.renamed]
        for names, what in ((self.dropped, "dropped"), (self.afresh, "not taken from the file")):
            reasons: dict[str, list[str]] = {}
            for name, reason in names:
                reasons.setdefault(reason, []).append(name)
            lines += [f"  {len(those)} {what}: {reason}: {few(those, verbose)}" for reason, those in reasons.items()]
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


def take_over(
    path: Path,
    network: nn.Module,
    spec: ModelSpec,
    catalog: ClassCatalog,
    reset_heads: bool = False,
    classes_by_id: bool = False,
) -> Imported:
    """The tensors of ``network``, which was built from ``spec`` for ``catalog``, out of a published file or folder.

    ``reset_heads`` leaves the class heads out; ``classes_by_id`` takes of each class head the rows that have the numbers of the
    dataset's category ids, as published Deformable DETR counts its classes.
    Raises UserError for a form that is not known or is another family's, and for every tensor that is missing, left over or of another shape
    without a known reason.
    """
    given = read_state(path)
    if all(name.startswith("module.") for name in given):
        given = {name.removeprefix("module."): value for name, value in given.items()}
    form = _recognise(path, given)
    if form.family != spec.name:
        raise UserError(
            f"{path}: holds a {form.title}, but the experiment's model.name is {spec.name}; choose an experiment of {form.family}"
        )
    found = RENAME[form.family]({name: _Traced.of(name, value) for name, value in given.items()})
    own = network.state_dict()
    imported = Imported(form, {})
    imported.notes += _compare_config(path, form, spec)
    _account_for(imported, given, found, own)
    _fit_heads(path, imported, found, own, catalog, reset_heads, classes_by_id)
    _require_all(path, imported, found, own)
    # The data pass through detach, so that what remembers its sources is not what is stored.
    imported.state |= {
        name: found[name].detach().as_subclass(Tensor).to(own[name].dtype) for name in own if name in found
    }
    return imported


class _Traced(Tensor):
    """A tensor that remembers the names it was made from, whatever a renaming table does with it."""

    sources: frozenset[str] = frozenset()

    @staticmethod
    def of(name: str, value: Tensor) -> _Traced:
        traced = value.detach().as_subclass(_Traced)
        traced.sources = frozenset({name})
        return traced

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]  # torch leaves it untyped
        sources = frozenset().union(*(tensor.sources for tensor in _traced(args)))
        for tensor in _traced(result):
            tensor.sources = sources
        return result


def _traced(value: Any) -> Iterator[_Traced]:
    if isinstance(value, _Traced):
        yield value
    elif isinstance(value, tuple | list):
        for one in value:
            yield from _traced(one)


def _recognise(path: Path, given: Mapping[str, Tensor]) -> Form:
    for form in FORMS:
        if any(name.startswith(form.marks) for name in given):
            return form
    looked_for = "\n  ".join(f"{form.title}: {' or '.join(f'{mark}*' for mark in form.marks)}" for form in FORMS)
    ours = any(name.startswith(("decoder.heads.", "decoder.class_embed.")) for name in given)
    advice = "\n  it has this project's own names: set train.pretrained_model_path to it as it is" if ours else ""
    raise UserError(
        f"{path}: is of no known form; its {len(given)} tensors have names like {few(sorted(given)[:3])}; looked for\n  {looked_for}{advice}"
    )


def _account_for(
    imported: Imported, given: Mapping[str, Tensor], found: dict[str, Tensor], own: Mapping[str, Tensor]
) -> None:
    """Fills in what was renamed and dropped; takes what is unused for a known reason out of ``found``."""
    used: set[str] = set()
    for name, value in list(found.items()):
        sources = sorted(value.sources) if isinstance(value, _Traced) else []
        used.update(sources)
        reason = None if name in own else _reason(_UNUSED, name)
        if reason is None:
            imported.renamed += [(source, name) for source in sources]
        else:
            imported.dropped += [(source, reason) for source in sources]
            del found[name]
    for name in given:
        if name not in used and (reason := _reason(_LEFT_OUT, name)) is not None:
            imported.dropped.append((name, reason))
        elif name not in used:
            found[name] = given[name]  # for the report of what is left over


def _fit_heads(
    path: Path,
    imported: Imported,
    found: dict[str, Tensor],
    own: Mapping[str, Tensor],
    catalog: ClassCatalog,
    reset: bool,
    by_id: bool,
) -> None:
    """Makes the class heads those of ``catalog``; raises UserError where they are not and nobody said what to do."""
    heads = [name for name in own if _HEAD.match(name)]
    void = 0 if imported.form.family == "deformable_detr" else 1
    if reset:
        for name in heads:
            found.pop(name, None)
            imported.afresh.append((name, "class heads start afresh (--reset-heads)"))
        imported.renamed = [(old, new) for old, new in imported.renamed if not _HEAD.match(new)]
        return
    present = [name for name in heads if name in found]
    if not present:
        return
    there, here = len(found[present[0]]) - void, len(catalog)
    if by_id:
        if void:
            raise UserError(
                f"--classes-by-id: only published Deformable DETR counts its classes by category id; {imported.form.title} has them in the "
                "order of the label map"
            )
        rows = [category.id for category in catalog.categories]
        if max(rows) >= there:
            raise UserError(
                f"{path}: its class head has rows 0 to {there - 1}, but the dataset has a category with id {max(rows)}; "
                "leave --classes-by-id out, or use --reset-heads"
            )
        for name in present:
            found[name] = found[name][torch.tensor(rows)]
        imported.notes.append(f"class heads: {here} of {there} rows, those that have the numbers of the category ids")
        return
    if there != here:
        by_id_fits = not void and max(category.id for category in catalog.categories) < there
        raise UserError(
            f"{path}: its class heads have {there} classes, the experiment's dataset has {here}. Start these heads afresh with --reset-heads"
            + (", take the rows that have the numbers of the category ids with --classes-by-id," if by_id_fits else "")
            + " or choose a dataset of these classes"
        )
    names = ", ".join(catalog.names[:3])
    imported.notes.append(
        f"class heads: {there} classes in the order of the dataset ({names}{', ...' if there > 3 else ''}); no tensor tells whether "
        "the file's have the same order"
    )


def _require_all(path: Path, imported: Imported, found: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Raises UserError unless every tensor of the network is given in its shape, and nothing else is."""
    reset = {name for name, _ in imported.afresh}
    no_texts = not any(oneformer.is_text(name) and name != "text.logit_scale" for name in found)
    missing = []
    for name in own:
        if name in found or name in reset:
            continue
        if name.endswith(".num_batches_tracked"):
            imported.state[name] = torch.zeros_like(own[name])
            imported.afresh.append((name, "frozen batch norms did not count batches; 0"))
        elif oneformer.is_text(name) and no_texts:
            imported.afresh.append((name, _NO_TEXTS))
        else:
            missing.append(name)
    left_over = [name for name in found if name not in own]
    title = f"{path}: {imported.form.title}, but not of this experiment's sizes; nothing was written"
    require_fit(title, own, found, missing, left_over, _advice)


def _compare_config(path: Path, form: Form, spec: ModelSpec) -> list[str]:
    """Holds ``spec`` to the config.json beside the weights where there is one; otherwise says what to compare by hand."""
    said: Mapping[str, Any] = {}
    config = weights_file(path).with_name("config.json")
    if "transformers" in form.title and config.is_file():
        content = read_json(config)
        said = content if isinstance(content, dict) else {}
    unseen, wrong = [], []
    for key, theirs in _UNSEEN[form.family]:
        value: Any = spec
        for part in key.split("."):
            value = getattr(value, part)
        if theirs not in said:
            unseen.append(f"model.{key} is {value}")
        elif said[theirs] != value:
            wrong.append(f"{theirs} is {said[theirs]}, but the experiment's model.{key} is {value}")
    if wrong:
        raise UserError(f"{config}: " + "; ".join(wrong))
    return [f"not told by the file, compare with its recipe: {', '.join(dict.fromkeys(unseen))}"] if unseen else []


def _reason(table: tuple[tuple[str, str], ...], name: str) -> str | None:
    return next((reason for pattern, reason in table if re.search(pattern, name)), None)


def _advice(name: str, value: Tensor) -> str:
    """The key that gives the file's shape, for what published sizes differ in most."""
    count = len(value)
    if name in ("query_feat.weight", "query_embed.weight"):
        return f" (set model.decoder.num_object_queries: {count})"
    if name == "decoder.query_embed.weight":
        return f" (set model.num_queries: {count})"
    if name.endswith("relative_position_bias_table"):
        return f" (set model.backbone.swin.window_size: {(math.isqrt(count) + 1) // 2})"
    return ""
