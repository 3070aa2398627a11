"""The rules between the fields of a layout with experts. Reads only; torch-free."""

from __future__ import annotations

from parallel.dims import ParallelDims, divisors, nearest
from trainer.config import EngineName, RunConfig, check_ep, require
from trainer.config_moe import BalanceScope, LayoutConfig, RouterName, Score


def check_layout(config: RunConfig, dims: ParallelDims) -> None:
    """Check a layout that has experts.

    Raises:
        ConfigError: the first rule that does not hold.
    """
    layout = config.layout
    _check_sizes(config, dims)
    _check_choice(layout)
    _ROUTER_RULES.get(layout.router, lambda _: None)(layout)
    _check_groups(layout)
    _check_balance(layout)
    if layout.capacity_factor is not None:
        require(
            layout.capacity_factor > 0,
            "layout.capacity_factor",
            layout.capacity_factor,
            "must be above 0, or null for dropless",
            "layout.capacity_factor=1.25",
        )


def _check_sizes(config: RunConfig, dims: ParallelDims) -> None:
    layout = config.layout
    for index, size in enumerate(layout.expert_sizes):
        for name in ("num", "ffn_dim"):
            value = getattr(size, name)
            rule = "must be above 0" + (
                ", or -1 for model.ffn_dim / granularity" if name == "ffn_dim" else ""
            )
            require(value > 0, f"layout.expert_sizes[{index}].{name}", value, rule, "a positive number")
    total = sum(size.num for size in layout.expert_sizes)
    require(
        not layout.expert_sizes or total == layout.num_experts,
        "layout.expert_sizes",
        " + ".join(str(size.num) for size in layout.expert_sizes),
        f"the experts of all sizes must add up to layout.num_experts = {layout.num_experts}",
        f"layout.num_experts={total}",
    )
    check_ep(config, dims)
    require(
        layout.expert_ffn_dim > 0,
        "layout.expert_ffn_dim",
        layout.expert_ffn_dim,
        "must be above 0, or -1 for model.ffn_dim / layout.granularity",
        f"layout.expert_ffn_dim={config.model.ffn_dim}",
    )
    if layout.target is None and config.engine.name is EngineName.native:
        # FSDP2 shards an expert along the model dimension and cannot pad there.
        widths = [size.ffn_dim for size in layout.expert_sizes] or [layout.expert_ffn_dim]
        named = "the ffn_dim of layout.expert_sizes" if layout.expert_sizes else "layout.expert_ffn_dim"
        require(
            all(width % dims.expert_shard == 0 for width in (config.model.dim, *widths)),
            "parallel.ep",
            dims.ep,
            f"each expert is sharded over dp_shard·cp·tp/ep = {dims.expert_shard} ranks, which must divide "
            f"model.dim = {config.model.dim} and {named} = {', '.join(str(width) for width in widths)}",
            f"parallel.ep={max(dims.legal_ep(layout.num_experts))}",
        )


def _check_choice(layout: LayoutConfig) -> None:
    choosable = layout.num_experts + layout.num_zero_experts + layout.num_copy_experts
    require(
        1 <= layout.top_k <= choosable,
        "layout.top_k",
        layout.top_k,
        f"a token goes to between 1 and {_choosable(layout)} = {choosable} experts",
        f"layout.top_k={min(max(1, layout.top_k), choosable)}",
    )
    require(
        layout.top_k > 1 or not layout.renormalize or layout.router is RouterName.expert_choice,
        "layout.renormalize",
        True,
        "with layout.top_k=1 the one weight would always be 1, and the loss could not teach the router",
        "layout.renormalize=false",
    )
    require(
        not layout.sample_second or (layout.router is RouterName.top_k and layout.top_k == 2),
        "layout.sample_second",
        True,
        f"there is a second of two experts with router=top_k and top_k=2 only, not with "
        f"router={layout.router.value} and top_k={layout.top_k}",
        "layout.sample_second=false",
    )
    require(
        layout.jitter < 1.0,
        "layout.jitter",
        layout.jitter,
        "noise in [1 - jitter, 1 + jitter] must keep the input's sign",
        "layout.jitter=0.01",
    )
    require(
        not layout.shared_gate or layout.num_shared_experts > 0,
        "layout.shared_gate",
        True,
        "there is no shared expert to gate (layout.num_shared_experts = 0)",
        "layout.num_shared_experts=1",
    )
    extra = layout.num_zero_experts + layout.num_copy_experts
    plain = layout.router in (RouterName.top_k, RouterName.sinkhorn) and layout.num_groups == 1
    require(
        not extra or plain,
        "layout.num_zero_experts" if layout.num_zero_experts else "layout.num_copy_experts",
        layout.num_zero_experts or layout.num_copy_experts,
        "experts that compute nothing are chosen by plain scores: router=top_k or sinkhorn, num_groups=1",
        "0",
    )


def _choosable(layout: LayoutConfig) -> str:
    parts = ["layout.num_experts"]
    parts += ["num_zero_experts"] if layout.num_zero_experts else []
    parts += ["num_copy_experts"] if layout.num_copy_experts else []
    return " + ".join(parts)


def _check_hierarchical(layout: LayoutConfig) -> None:
    require(
        layout.num_groups > 1,
        "layout.num_groups",
        layout.num_groups,
        "router=hierarchical chooses groups first, so there are at least two",
        f"layout.num_groups={next((n for n in divisors(layout.num_experts) if n > 1), 2)}",
    )
    require(
        layout.top_groups > 0 and layout.top_k % layout.top_groups == 0,
        "layout.top_k",
        layout.top_k,
        f"each of the layout.top_groups = {layout.top_groups} chosen groups gives equally many experts",
        f"layout.top_k={max(1, layout.top_groups)}",
    )
    _require_softmax(layout)


def _check_expert_choice(layout: LayoutConfig) -> None:
    require(
        layout.capacity_factor is not None,
        "layout.capacity_factor",
        None,
        "router=expert_choice: an expert picks ceil(factor · seq_len · top_k / num_experts) tokens of a row",
        "layout.capacity_factor=1.0",
    )
    require(
        layout.balance.coefficient == 0,
        "layout.balance.coefficient",
        layout.balance.coefficient,
        "with router=expert_choice every expert has the same load, and there is nothing to balance",
        "layout.balance.coefficient=0",
    )
    _require_softmax(layout)
    _require_one_group(layout)


def _check_hash(layout: LayoutConfig) -> None:
    require(
        layout.num_experts % max(1, layout.top_k) == 0,
        "layout.top_k",
        layout.top_k,
        f"router=hash draws each choice from its own part of the experts: it must divide {layout.num_experts}",
        f"layout.top_k={nearest(layout.top_k, divisors(layout.num_experts))}",
    )
    taught = {
        "layout.balance.coefficient": layout.balance.coefficient,
        "layout.balance.router_z": layout.balance.router_z,
        "layout.balance.bias_update_rate": layout.balance.bias_update_rate,
        "layout.jitter": layout.jitter,
        "layout.logit_norm": layout.logit_norm,
    }
    for name, value in taught.items():
        require(value == 0, name, value, "router=hash learns nothing that this could change", f"{name}=0")
    _require_one_group(layout)


def _check_sinkhorn(layout: LayoutConfig) -> None:
    _require_one_group(layout)
    rate = layout.balance.bias_update_rate
    relation = "router=sinkhorn balances by itself; a bias would be lost in it"
    require(rate == 0, "layout.balance.bias_update_rate", rate, relation, "layout.balance.bias_update_rate=0")


_ROUTER_RULES = {
    RouterName.hierarchical: _check_hierarchical,
    RouterName.expert_choice: _check_expert_choice,
    RouterName.hash: _check_hash,
    RouterName.sinkhorn: _check_sinkhorn,
}


def _require_softmax(layout: LayoutConfig) -> None:
    require(
        layout.score is Score.softmax,
        "layout.score",
        layout.score.value,
        f"router={layout.router.value} chooses by probabilities",
        "layout.score=softmax",
    )


def _require_one_group(layout: LayoutConfig) -> None:
    require(
        layout.num_groups == 1,
        "layout.num_groups",
        layout.num_groups,
        f"router={layout.router.value} knows no groups",
        "layout.num_groups=1",
    )


def _check_groups(layout: LayoutConfig) -> None:
    num_experts = layout.num_experts
    require(
        layout.num_groups >= 1 and num_experts % layout.num_groups == 0,
        "layout.num_groups",
        layout.num_groups,
        f"must divide layout.num_experts = {num_experts}",
        f"layout.num_groups={nearest(layout.num_groups, divisors(num_experts))}",
    )
    require(
        1 <= layout.top_groups <= layout.num_groups,
        "layout.top_groups",
        layout.top_groups,
        f"between 1 and layout.num_groups = {layout.num_groups}",
        f"layout.top_groups={min(max(1, layout.top_groups), layout.num_groups)}",
    )
    chosen_from = layout.top_groups * (num_experts // layout.num_groups)
    require(
        layout.num_groups == 1 or layout.top_k <= chosen_from,
        "layout.top_k",
        layout.top_k,
        f"the top {layout.top_groups} group(s) hold {chosen_from} experts to choose from",
        f"layout.top_k={chosen_from}",
    )


def _check_balance(layout: LayoutConfig) -> None:
    balance = layout.balance
    require(
        balance.bias_update_rate == 0 or layout.score is Score.sigmoid,
        "layout.balance.bias_update_rate",
        balance.bias_update_rate,
        "the auxiliary-loss-free bias is added to sigmoid scores (arXiv:2408.15664)",
        "layout.score=sigmoid, or bias_update_rate=0 and balance.coefficient=0.01",
    )


def split_of(config: RunConfig, dims: ParallelDims) -> list[int] | None:
    """How a step's rows are split, ``[ranks, rows a forward pass]``, where what is computed depends on it."""
    layout = config.layout
    by_pass = layout.balance.scope is BalanceScope.micro and layout.balance.coefficient > 0
    return [dims.dp, config.train.micro_batch] if layout.num_experts and by_pass else None


def require_provable(config: RunConfig, dims: ParallelDims) -> None:
    """Raise ConfigError where by the config's own definition one process would compute something else."""
    split = split_of(config, dims)
    require(
        split is None or split == [1, config.train.global_batch],
        "layout.balance.scope",
        "micro",
        f"the balance loss counts the rows of one forward pass, so {dims.dp} data-parallel rank(s) with "
        f"train.micro_batch={config.train.micro_batch} compute another loss than one process with all "
        f"{config.train.global_batch} rows: there is nothing to prove",
        "layout.balance.scope=sequence or step",
    )
