"""What one rank trains with: decided options, the method on its device, the loader."""

from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline import MaskedViews
from schemas import ShardDataset
from train.config import TrainConfig, cache_of, resolved
from train.distributed import rank, world_size
from train.encoders import zero_residual_gammas_
from train.data import SYNTHETIC_CLASSES, SyntheticViews, Views
from train.methods import Method, Setup
from train.process_group import pick_device
from train.training_step import placed


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one rank trains with."""

    given: TrainConfig  # as it was asked for
    config: TrainConfig  # with everything decided
    device: torch.device
    data_name: str
    data_digest: str  # of what it trains on
    method: Method
    views: Views

    @property
    def out(self) -> Path:
        return Path(self.config.out)

    @property
    def epoch_steps(self) -> int:
        return len(self.views)

    @property
    def total_steps(self) -> int:
        return self.epoch_steps * self.config.epochs


def prepare(given: TrainConfig) -> Job:
    """Decide what was left open, build the method, open the loader.

    Raises:
        UserError: data or options that do not fit.
    """
    device = pick_device(given.device)
    config = resolved(given, device)
    dataset = None if config.synthetic else ShardDataset.open(config.data)
    torch.manual_seed(config.seed)  # equal weights on every rank
    torch.backends.cudnn.benchmark = True  # views are of one size
    labels = [] if dataset is None else dataset.samples["label"].to_pylist()
    setup = Setup(
        encoder=config.encoder,
        stem=config.stem,
        sync_bn=config.sync_bn,
        batch_size=config.batch_size,
        accumulate=config.accumulate,
        crop_size=config.recipe.crop_size,
        classes=SYNTHETIC_CLASSES if dataset is None else len(dataset.classes),
        unlabelled=sum(label < 0 for label in labels),
        seed=config.seed,
    )
    method = config.method.build(setup)
    if config.zero_init_residual:
        zero_residual_gammas_(method, config.encoder)
    method = placed(method, config, device)
    return Job(
        given=given,
        config=config,
        device=device,
        data_name="synthetic" if dataset is None else dataset.card.name,
        data_digest="synthetic" if dataset is None else dataset.digest,
        method=method,
        views=open_views(config, device),
    )


def open_views(config: TrainConfig, device: torch.device) -> Views:
    """The loader of this rank."""
    share = config.batch_size // world_size()
    if config.synthetic:
        return SyntheticViews(
            config.synthetic, config.recipe, share, device, world_size(), config.seed
        )
    return MaskedViews(
        config.data,
        recipe=config.recipe,
        batch_size=share,
        device=device.type,
        rank=rank(),
        world_size=world_size(),
        seed=config.seed,
        report=("keys",),
        cache=cache_of(config.cache, config.cache_gb),
        shuffle_shards=config.shuffle_shards,
        streams=config.streams,
    )
