"""Students that start from their teacher: some of its layers, or its word embeddings.

Each factory has `initialise`: `teacher` copies the weights, `random` builds the same shapes with random ones. The
pipeline recognises such a student by it, and trains two baselines from labels: the same architecture from random
weights, and from the teacher's.

The student shares no memory with the teacher.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from kd_lightning.models.adapt import unwrap
from kd_lightning.models.embedding import FactorizedEmbedding, principal_components
from kd_lightning.models.hf import PooledClassifier, layer_stack
from kd_lightning.models.initialise import Initialise, check_initialise
from kd_lightning.models.narrow import Cut, important, narrow_config
from kd_lightning.models.rebuild import factorise_embedding, fresh_network
from kd_lightning.runtime.errors import ConfigError
from kd_lightning.types import MOST_PADDING_ROWS

log = logging.getLogger(__name__)


def from_teacher(
    teacher: nn.Module,
    num_classes: int,
    layers: int | float | Sequence[int] = 2,
    embedding_rank: int | None = None,
    copy_head: bool = True,
    initialise: Initialise = "teacher",
    width: int | None = None,
) -> nn.Module:
    """Build a student from some layers of a BERT-like teacher (BERT, RoBERTa, DistilBERT, ELECTRA, ...).

    Everything but the encoder layers is copied as it is, unless `width` cuts it: embeddings, pooler, and, when the
    number of classes agrees and `copy_head` is true, the classifier head (Sanh et al. 2019, DistilBERT, arXiv
    1910.01108).

    Args:
        teacher: A sequence classifier of `transformers`, a `PooledClassifier` or a `SentenceEncoder`.
        num_classes: Number of classes of the student, or how wide its embedding is.
        layers: Which layers, in this order, counted from 0; negative ones from the end. A number k takes k layers
            evenly spaced up to the last: layer `(i + 1) n // k - 1` for i = 0..k-1, so 3 of 6 are layers 1, 3 and 5. A
            share below 1 takes so much of the n layers, at least one.
        embedding_rank: Rank r of factorised word embeddings: the best approximation of the teacher's table by a (V, r)
            table times an (r, H) projection, from a truncated singular value decomposition; the log reports the share
            of the squared norm that is kept. None: the full table.
        copy_head: Copy the teacher's classifier head when the number of classes agrees; otherwise it is fresh.
        initialise: `teacher`: copy as described; `random`: the same architecture with fresh weights.
        width: Make a BERT so much narrower: of its hidden dimensions, heads and feed-forward units the most important
            are taken (`kd_lightning.models.narrow`); a multiple of the size of its heads. None: as wide as it is.

    Returns:
        A network of the teacher's class, in training mode, all its parameters trainable.

    Raises:
        ConfigError: Not such a teacher, a layer it does not have, or a width or rank that does not make it smaller.
    """
    check_initialise(initialise)
    teacher = unwrap(teacher)
    source = _hugging_face_part(teacher)
    stack = layer_stack(source)
    chosen = chosen_layers(layers, source.config.num_hidden_layers)
    config = student_config(source.config, chosen, num_classes)
    cut = None
    if width is not None:
        narrow_config(config, width)
        cut = important(source.state_dict(), _word_embeddings(teacher), source.config, config, chosen)
    student = _build(teacher, config, num_classes)
    target = _hugging_face_part(student)
    embedding = _factorised(target, source, embedding_rank)
    if initialise == "random":
        return student
    renamed = {f"{stack}.{new}.": f"{stack}.{old}." for new, old in enumerate(chosen)}
    prefix = "encoder." if isinstance(teacher, PooledClassifier) else ""
    renamed = {prefix + new: prefix + old for new, old in renamed.items()}
    fresh = () if copy_head and _num_classes(teacher) == num_classes else _head_names(teacher)
    fresh += tuple(f"{name}." for name, module in student.named_modules() if module is embedding)
    copy_weights(student, teacher, renamed, fresh, cut)
    if embedding is not None:
        table = _word_embeddings(teacher)
        kept = embedding.approximate(table if cut is None else table[:, cut.hidden])
        log.info("word embeddings factorised to rank %d: %.1f%% of their squared norm kept", embedding.rank, 100 * kept)
    return student


def embeddings_from_teacher(
    teacher: nn.Module,
    num_classes: int,
    vocab_size: int,
    network: Callable[..., nn.Module],
    pad_token_id: int = 0,
    scale: float = 5.0,
    initialise: Initialise = "teacher",
    per_token: bool = False,
) -> nn.Module:
    """Build a student whose word embeddings are the principal components of the teacher's.

    The teacher's table `(V, H)` is centred, reduced to as many principal components as the student's embeddings are
    wide, and scaled to `scale` times the root mean square of its fresh ones; the padding row stays zero. Both must
    use the same token ids.

    Args:
        teacher: Any network with `get_input_embeddings()` (text models of `transformers`), or a `PooledClassifier`.
        num_classes: Number of classes.
        vocab_size: The teacher's, but for padding rows at the end of its table.
        network: Makes the student, which needs `get_input_embeddings()`; given `num_classes`, `vocab_size` and
            `pad_token_id`.
        pad_token_id: The padding id.
        scale: Adam's steps have the size of the learning rate, whatever the size of the weights: the larger the
            embeddings, the less training moves them.
        initialise: `teacher`: as described; `random`: the same network with fresh embeddings.
        per_token: The network is to classify each token; it is then given that too.

    Raises:
        ConfigError: The teacher has no word embeddings, other ones (another tokenizer) or narrower ones; the student
            has none.
    """
    check_initialise(initialise)
    if not scale > 0:
        raise ConfigError(f"student.scale={scale} is not above 0")
    table = _word_embeddings(teacher)
    if not 0 <= table.shape[0] - vocab_size <= MOST_PADDING_ROWS:
        raise ConfigError(
            f"the teacher has embeddings of {table.shape[0]} tokens and the student's vocabulary has {vocab_size}: "
            "let both use the teacher's tokenizer (data.tokenizer), or choose a student that takes nothing from it"
        )
    sizes = {"num_classes": num_classes, "vocab_size": vocab_size, "pad_token_id": pad_token_id}
    sizes |= {"per_token": True} if per_token else {}
    if lacking := sizes.keys() - inspect.signature(network).parameters.keys():
        raise ConfigError(
            f"student.network takes no {', '.join(sorted(lacking))}: give one that is built for the data's words, such "
            "as bilstm, text_cnn or transformer (model@student.network=NAME)"
        )
    student = network(**sizes)
    if not hasattr(student.encoder if isinstance(student, PooledClassifier) else student, "get_input_embeddings"):
        raise ConfigError(f"student.network: {type(student).__name__} has no word embeddings (get_input_embeddings())")
    fresh = _word_embeddings(student)
    if fresh.shape[1] > table.shape[1]:
        raise ConfigError(
            f"student.network: its word embeddings, {fresh.shape[1]} wide, are wider than the teacher's: give at most "
            f"{table.shape[1]}"
        )
    if initialise == "teacher":
        with torch.no_grad():
            rms = scale * float(fresh.square().mean().sqrt())
            fresh.copy_(principal_components(table[:vocab_size], fresh.shape[1], rms))
            fresh[pad_token_id].zero_()
    return student


def _word_embeddings(network: nn.Module) -> Tensor:
    """Return a network's full table of word embeddings `(V, H)`, detached."""
    network = unwrap(network)
    network = network.encoder if isinstance(network, PooledClassifier) else network
    getter = getattr(network, "get_input_embeddings", None)
    embedding = getter() if callable(getter) else None
    if isinstance(embedding, FactorizedEmbedding):
        return (embedding.table.weight @ embedding.projection.weight.T).detach()
    if not isinstance(getattr(embedding, "weight", None), Tensor):
        raise ConfigError(
            f"{type(network).__name__} has no word embeddings to start from: it needs get_input_embeddings(), which "
            "Hugging Face text models have; use one that takes nothing from the teacher, such as model@student=bilstm"
        )
    weight: Tensor = embedding.weight  # type: ignore[union-attr]
    return weight.detach()


def _hugging_face_part(network: nn.Module) -> PreTrainedModel:
    part = network.encoder if isinstance(network, PooledClassifier) else network
    if not isinstance(part, PreTrainedModel) or part.config.is_encoder_decoder:
        raise ConfigError(
            f"a student of teacher layers needs an encoder of transformers as teacher, not "
            f"{type(part).__name__}: use another student, such as model@student=bilstm or model@student=transformer"
        )
    if part is network and part.base_model is part:
        raise ConfigError(f"the teacher {type(part).__name__} has no classifier: model@teacher.network=hf adds one")
    return part


def chosen_layers(layers: int | float | Sequence[int], available: int) -> list[int]:
    """Return the teacher's layer numbers, counted from 0, of the student's layers."""
    if isinstance(layers, float):
        if not 0 < layers < 1:
            raise ConfigError(f"layers={layers}: a share of the teacher's layers is between 0 and 1, such as 0.5")
        layers = max(round(layers * available), 1)
    if isinstance(layers, int):
        if not 1 <= layers <= available:
            raise ConfigError(
                f"layers={layers}: the teacher has {available} layers, give a number from 1 to {available}"
            )
        return [(i + 1) * available // layers - 1 for i in range(layers)]
    wrong = [layer for layer in layers if not -available <= layer < available]
    if wrong or not layers:
        raise ConfigError(
            f"layers={list(layers)}: the teacher has {available} layers, give numbers from 0 to {available - 1}, "
            f"or from -{available} to -1 to count from the end"
        )
    return [layer % available for layer in layers]


def student_config(config: PreTrainedConfig, chosen: list[int], num_classes: int) -> PreTrainedConfig:
    """Return a teacher's configuration with these layers only."""
    config = copy.deepcopy(config)
    kinds = getattr(config, "layer_types", None)
    if isinstance(kinds, list) and len(kinds) == config.num_hidden_layers:  # local and global attention, for example
        config.layer_types = [kinds[layer] for layer in chosen]
    config.num_hidden_layers = len(chosen)
    config.num_labels = num_classes
    return config


def _build(teacher: nn.Module, config: PreTrainedConfig, num_classes: int) -> nn.Module:
    """Build a fresh network of the teacher's class."""
    part = _hugging_face_part(teacher)
    network = fresh_network(type(part), config, config._attn_implementation)
    if isinstance(teacher, PooledClassifier):
        return teacher.like(network, num_classes)
    return network


def _factorised(target: PreTrainedModel, source: PreTrainedModel, rank: int | None) -> FactorizedEmbedding | None:
    """Factorise the student's embeddings if `rank` is given or the teacher's are factorised."""
    teachers = source.get_input_embeddings()
    if rank is None:
        if not isinstance(teachers, FactorizedEmbedding):
            return None
        rank = teachers.rank
    width = target.get_input_embeddings().weight.shape[1]  # type: ignore[index]
    if not 1 <= rank < width:
        raise ConfigError(f"embedding_rank={rank} does not make {width}-wide embeddings smaller: give 1 to {width - 1}")
    return factorise_embedding(target, rank)


def _num_classes(network: nn.Module) -> int:
    if isinstance(network, PooledClassifier):
        return network.num_classes
    return int(_hugging_face_part(network).config.num_labels or 0)


def _head_names(network: nn.Module) -> tuple[str, ...]:
    """Return the prefixes of everything outside the base model."""
    base = "encoder" if isinstance(network, PooledClassifier) else str(network.base_model_prefix)
    return tuple(f"{name}." for name, _ in network.named_children() if name != base)


@torch.no_grad()
def copy_weights(
    student: nn.Module,
    teacher: nn.Module,
    renamed: dict[str, str],
    fresh: tuple[str, ...] = (),
    cut: Cut | None = None,
) -> None:
    """Copy the teacher's weights, cut, to the student's; skip factorised embeddings and `fresh` ones."""
    source = teacher.state_dict()
    for name, value in student.state_dict().items():
        prefix = next((new for new in renamed if name.startswith(new)), "")
        old = renamed.get(prefix, "") + name.removeprefix(prefix)
        if not name.startswith(fresh):
            value.copy_(source[old] if cut is None else cut(old, source[old]))
