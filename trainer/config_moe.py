"""What a config may say of experts: how they are laid out and chosen, watched and cured. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class Score(Enum):
    softmax = "softmax"
    sigmoid = "sigmoid"


class RouterName(Enum):
    top_k = "top_k"
    hierarchical = "hierarchical"
    sinkhorn = "sinkhorn"
    expert_choice = "expert_choice"
    hash = "hash"


class DropBy(Enum):
    position = "position"
    score = "score"


class BalanceScope(Enum):
    sequence = "sequence"
    step = "step"
    micro = "micro"


class BiasUpdate(Enum):
    sign = "sign"
    proportional = "proportional"


@dataclass
class BalanceConfig:
    coefficient: float = 0.0
    """Weight of the balance loss."""
    scope: BalanceScope = BalanceScope.sequence
    """Over what the load of an expert is counted. sequence: each row; step: the whole step before; micro: the
    rows of one forward pass on one rank, which changes with the layout (`muster verify` refuses it)."""
    router_z: float = 0.0
    """Weight of the router z-loss."""
    bias_update_rate: float = 0.0
    """Step of the auxiliary-loss-free router bias; 0: no bias."""
    bias_update: BiasUpdate = BiasUpdate.sign
    """sign: each expert's bias moves by the rate; proportional: by the rate times its load / mean - 1."""


@dataclass
class ExpertSize:
    """Experts of one width, where a layer has experts of several (``layout.expert_sizes``)."""

    num: int = 0
    ffn_dim: int = -1
    granularity: int = 1


@dataclass
class LayoutConfig:
    """Where experts stand in the model and how tokens choose them."""

    name: str = "custom"
    num_experts: int = 0
    """Routed experts in a MoE layer; 0: every layer is dense."""
    top_k: int = 1
    """Experts a token goes to; with router=expert_choice on average."""
    expert_ffn_dim: int = -1
    """Hidden width of one expert; -1: model.ffn_dim / granularity."""
    granularity: int = 1
    expert_sizes: list[ExpertSize] = field(default_factory=list)
    """Experts of several widths: `[{num: 8, granularity: 2}, {num: 4, ffn_dim: 512}]`, which add up to
    num_experts. Empty: all have expert_ffn_dim."""
    num_zero_experts: int = 0
    """Further experts that answer nothing: a token that chooses one skips that share of the work."""
    num_copy_experts: int = 0
    """Further experts that answer the token itself."""
    num_shared_experts: int = 0
    """Experts that every token passes; built as one feed-forward of their summed width."""
    shared_gate: bool = False
    """Whether the shared experts' answer is multiplied by a learnt gate in (0, 1)."""
    first_dense_layers: int = 0
    moe_every: int = 1
    """Of the layers after the first dense ones, each n-th is MoE (the last of every n)."""
    router: RouterName = RouterName.top_k
    """top_k: the best scores; hierarchical: the best groups, then the best in each; sinkhorn: the best after the
    scores of a row were balanced; expert_choice: each expert picks its tokens; hash: by the token's id."""
    score: Score = Score.softmax
    logit_norm: float = 0.0
    """Standard deviation that a token's router logits are normalised to; 0: they are left as they are."""
    jitter: float = 0.0
    """In training the router's input is multiplied by noise in [1 - jitter, 1 + jitter]."""
    sample_second: bool = False
    """With top_k=2, in training the second expert is used with probability min(1, 2 · its weight)."""
    renormalize: bool = True
    """Whether the k chosen scores are divided by their sum."""
    route_scale: float = 1.0
    num_groups: int = 1
    top_groups: int = 1
    """Group-limited routing: experts are chosen inside the best top_groups of num_groups."""
    capacity_factor: float | None = None
    """None: dropless. Else each expert takes ceil(factor · seq_len · top_k / num_experts) tokens a row."""
    drop_by: DropBy = DropBy.position
    """Who gets the places: first choices before second ones and earlier positions first, or the best scores."""
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    target: str | None = None
    """Your own feed-forward layer: ``package.module:callable`` (docs/extending.md)."""
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass
class HealthConfig:
    """What is watched of the routing, and from where on it is trouble (docs/health.md)."""

    every: int = 10
    """Steps between looks at the window, when alarms may come; 0: the routing is not watched."""
    window: int = 20
    """Steps that the window looks back: an exponential mean whose weights fall to 1/e over them."""
    maps_every: int = 100
    """Steps between counts of which experts are chosen together; evaluations count besides. 0: these only."""
    collapse: float = 0.25
    """Alarm where the load is spread less evenly than this: 1 evenly, 0 when the same top_k experts take every
    token. 0: no such alarm."""
    dead_steps: int = 50
    """Alarm where an expert had no token for so many steps; 0: no such alarm."""
    entropy: float = 0.03
    """Alarm where the router's entropy is below this share of an even router's; 0: no such alarm."""
    entropy_fall: float = 0.5
    """Alarm where the entropy over the window is below this share of that over eight windows; 0: no such alarm."""
    rank_max_over_mean: float = 1.75
    """Alarm where the busiest ep rank is sent so many times the mean (dropless layouts); 0: no such alarm."""
    drop_rate: float = 0.4
    """Alarm where this share of the routed pairs is dropped; 0: no such alarm."""
    trace_every: int = 0
    """Steps between recordings of every token's choices into traces/, those of evaluations besides; 0: none."""
    replay: str | None = None
    """A run directory whose traces the routers follow instead of choosing."""


@dataclass
class RaiseBalanceConfig:
    """Multiply a layer's balance coefficient while the layer stays uneven (docs/cure.md)."""

    enabled: bool = False
    """Whether a layer that stays uneven gets a larger balance coefficient."""
    threshold: float = 2.0
    """Uneven: the busiest expert's load / the mean is above this."""
    even: float = 1.25
    """Even again: it is below this; the coefficient then goes down again, by the same steps."""
    patience: int = 50
    """Steps that are looked at, and that pass before a layer's coefficient is changed again."""
    factor: float = 2.0
    """By which the coefficient is multiplied, and divided on the way back."""
    limit: float = 16.0
    """Never above this many times layout.balance.coefficient."""


@dataclass
class AdaptBalanceConfig:
    """A balance coefficient a layer that follows what the layer drops (Skywork-MoE, arXiv:2406.06563, 4.2)."""

    enabled: bool = False
    """Whether each layer's balance coefficient follows its drop rate, instead of layout.balance.coefficient."""
    sensitivity: float = 0.2
    """Coefficient / drop rate; without a capacity the rate that a capacity of the mean load would drop."""
    maximum: float = 0.01
    """Of the coefficient."""
    decay: float = 0.99
    """Of the moving average that the coefficient is."""


@dataclass
class ReviveDeadConfig:
    """Let dead experts take over half of busy ones, optimizer state included (docs/cure.md)."""

    enabled: bool = False
    """Whether dead experts are made from busy ones."""
    threshold: float = 0.01
    """Dead: a load / mean at or below this over the last `patience` steps, or no token at all in as many."""
    patience: int = 100
    """Steps before an expert counts as dead, and that a layer is left alone after it was operated on."""
    max_at_once: int = 4
    """Experts of the whole model that are revived after one step; the worst layers come first."""
    noise: float = 0.01
    """Relative standard deviation of the noise on the copy's weights."""
    split: float = 0.1
    """Relative standard deviation of what tells the two rows of the router apart."""


@dataclass
class ResetBiasConfig:
    """Set the router's bias of auxiliary-loss-free balancing back to 0 where it has run away (docs/cure.md)."""

    enabled: bool = False
    """Whether a bias that has run away is set back to 0."""
    threshold: float = 2.0
    """Uneven: the busiest expert's load / the mean is above this over the last `patience` steps."""
    spread: float = 1.0
    """Run away: the largest bias - the smallest one is at least this; scores are between 0 and 1."""
    patience: int = 100
    """Steps that are looked at, and that a layer is left alone after a reset."""


@dataclass
class CureConfig:
    """What is done about experts that are used too much or not at all (docs/cure.md)."""

    every: int = 1
    """Steps between looks at the loads; each is a copy of them to the host."""
    raise_balance: RaiseBalanceConfig = field(default_factory=RaiseBalanceConfig)
    adapt_balance: AdaptBalanceConfig = field(default_factory=AdaptBalanceConfig)
    revive_dead: ReviveDeadConfig = field(default_factory=ReviveDeadConfig)
    reset_bias: ResetBiasConfig = field(default_factory=ResetBiasConfig)
