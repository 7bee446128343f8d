"""The training objective: predict each token from earlier tokens, some of which are wrong.

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
    """Noise that training adds to the model's input: wrong tokens and hidden actions."""

    token_noise: Share = 0.1
    """Largest share of a window's tokens that is replaced in the input.

    Each window's share is drawn uniformly between 0 and this number. The noise teaches the model to
    continue from its own mistakes.
    """
    action_dropout: ActionDropoutConfig = field(default_factory=ActionDropoutConfig)
    """How often actions are hidden."""


class WorldModelObjective(Trainable):
    """The training loss of a `Transformer`: the mean cross-entropy of a window's tokens."""

    def __init__(self, config: InputNoiseConfig, transformer: Transformer) -> None:
        super().__init__()
        self.config = config
        self.transformer = transformer

    def players(self) -> list[Player]:
        """Return the transformer, whose gradients are all clipped together, as the only `Player`.

        Weight decay also applies to the embeddings: it shrinks a code's own vector, so the code
        relies more on the vectors of its digits, which it shares with other codes.
        """
        return [Player("model", self.transformer)]

    def ema_module(self) -> Transformer:
        """Return the transformer, which has all the parameters."""
        return self.transformer

    def blocks(self) -> Iterable[nn.Module]:
        """Return the transformer's blocks."""
        return self.transformer.blocks

    def limit_parameters(self) -> None:
        """Keep the attention's gains in the range for which its compiled code is made."""
        self.transformer.limit_gains()

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss (nats per token) and the metrics of a batch from `TokenWindows`.

        The batch has `tokens` [B, T, R, C], `previous` [B, R, C], `has_previous` [B], `actions`
        [B, T, 2] and `action_valid` [B, T, 2]. In eval mode, the input has no noise.
        """
        tokens, valid = batch["tokens"], batch["action_valid"]
        inputs = torch.cat([batch["previous"][:, None], tokens], dim=1)
        if self.training:
            inputs = replace_tokens(inputs, self.config.token_noise)
            valid = drop_actions(valid, self.config.action_dropout)
        logits = self.transformer(
            inputs[:, 1:], inputs[:, 0], batch["has_previous"], batch["actions"], valid
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

    Replacements are drawn from the tokens of the batch, so they have the same frequencies as real
    tokens. They resemble sampling errors more than uniformly random codes would.
    """
    if largest_share == 0:
        return tokens
    device = tokens.device
    share = torch.rand(len(tokens), 1, 1, 1, device=device) * largest_share
    elsewhere = tokens.flatten()[torch.randint(tokens.numel(), tokens.shape, device=device)]
    return torch.where(torch.rand(tokens.shape, device=device) < share, elsewhere, tokens)
