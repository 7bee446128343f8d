"""What the world model is trained for: the next token, from a past that is not quite right.

Axes: B batch, T frames, R rows, C cols, K codes, A = 2 action channels.
"""

import math
from collections.abc import Iterable
from dataclasses import field

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from driving_sim.engine.config import Share, config
from driving_sim.engine.training.optimizer import Player
from driving_sim.engine.training.trainable import Batch, Trainable
from driving_sim.world_model.actions import ActionDropoutConfig, drop_actions
from driving_sim.world_model.transformer import Transformer


@config
class InputNoiseConfig:
    """What training hides or gets wrong in the input, beyond plain next-token prediction."""

    token_noise: Share = 0.1
    """Largest share of a window's tokens that is replaced in the input; each window's own share
    is drawn from 0 to this. It teaches the model to go on from its own mistakes."""
    action_dropout: ActionDropoutConfig = field(default_factory=ActionDropoutConfig)
    """How often actions are hidden."""


class WorldModelObjective(Trainable):
    """The training loss of a `Transformer`: cross-entropy of every token of a window."""

    def __init__(self, config: InputNoiseConfig, transformer: Transformer) -> None:
        super().__init__()
        self.config = config
        self.transformer = transformer

    def players(self) -> list[Player]:
        """One; matrices and embeddings decay: towards what their digits share."""
        return [Player("model", self.transformer)]

    def ema_module(self) -> Transformer:
        """Everything that has parameters."""
        return self.transformer

    def blocks(self) -> Iterable[nn.Module]:
        """The transformer's blocks."""
        return self.transformer.blocks

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return loss (nats) and metrics of a batch as `TokenWindows` makes it.

        `tokens` [B, T, R, C], `previous` [B, R, C], `has_previous` [B], `actions` [B, T, 2],
        `action_valid` [B, T, 2]. In eval mode there is no noise and nothing is hidden.
        """
        tokens, valid = batch["tokens"], batch["action_valid"]
        seen = torch.cat([batch["previous"][:, None], tokens], dim=1)
        if self.training:
            seen = replace_tokens(seen, self.config.token_noise)
            valid = drop_actions(valid, self.config.action_dropout)
        logits = self.transformer(
            seen[:, 1:], seen[:, 0], batch["has_previous"], batch["actions"], valid
        )
        flat = rearrange(logits, "b t r c k -> (b t r c) k").float()
        target = rearrange(tokens, "b t r c -> (b t r c)")
        loss = F.cross_entropy(flat, target)
        return loss, {
            "bits_per_token": loss.detach() / math.log(2),
            "accuracy": (flat.detach().argmax(-1) == target).float().mean(),
        }


def replace_tokens(tokens: Tensor, largest_share: float) -> Tensor:
    """Replace a random share, up to `largest_share`, of each window's tokens [B, T, R, C].

    The replacements are tokens from elsewhere in the batch, so that each is as frequent as it is
    in the data: sampling errors look like that, uniform noise does not.
    """
    if largest_share == 0:
        return tokens
    device = tokens.device
    share = torch.rand(len(tokens), 1, 1, 1, device=device) * largest_share
    elsewhere = tokens.flatten()[torch.randint(tokens.numel(), tokens.shape, device=device)]
    return torch.where(torch.rand(tokens.shape, device=device) < share, elsewhere, tokens)
