"""What the training loop asks of a method, and no more."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor, nn


class Method(nn.Module, ABC):
    """The modules and the loss of one way to pretrain an encoder.

    All that a method must remember between steps lies in its parameters, buffers and extra state,
    so that its state_dict alone resumes it. Trainable is whatever requires a gradient.

    Args of every method: `encoder` (a name of train.encoders), `config` (the method's own frozen
    dataclass), `batch_size` (the global batch), `seed`. The constructor raises UserError when they
    do not fit each other.
    """

    name: ClassVar[str]
    Config: ClassVar[type]

    @abstractmethod
    def __init__(self, encoder: str, config: Any, *, batch_size: int, seed: int) -> None:
        super().__init__()

    @abstractmethod
    def forward(self, batch: Any) -> dict[str, Tensor]:
        """One step on this rank's part of the batch.

        `batch` is what pipeline.MaskedViews yields; a method names in its docstring the fields
        that it reads. Returns scalars: `loss`, with gradient, and others to be logged.
        """

    @abstractmethod
    def exported(self) -> nn.Module:
        """The encoder that the pretraining is for."""

    def notes(self, samples: int) -> list[str]:
        """What a person should know about these settings on `samples` images; one line each."""
        return []
