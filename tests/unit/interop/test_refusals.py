"""Whatever a conversion does not cover is an error with one message, and nothing is left behind."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from interop_helpers import make, tensors
from safetensors.torch import save_file

from launch.convert import export, import_
from parallel.errors import ConfigError
from trainer.compose import compose, freeze, load_frozen
from trainer.config import Machine, resolve
from trainer.interop import families, verify
from trainer.interop.families import family_for
from trainer.interop.olmoe import OLMOE


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with the model of a variant; made once, only to be read."""
    made: dict[str, Path] = {}

    def get(variant: str) -> Path:
        if variant not in made:
            made[variant] = make(variant, tmp_path_factory.mktemp("saved") / "model")
        return made[variant]

    return get


def refused(source: Path, tmp_path: Path, *overrides: str) -> str:
    """The message of an import that must fail; asserts that it leaves nothing."""
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ConfigError) as caught:
        import_([str(source), str(tmp_path / "run"), "device=cpu", "verify=false", *overrides])
    assert sorted(tmp_path.iterdir()) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edited(source: Path, folder: Path, **values: Any) -> Path:
    """A copy whose config.json has other values; ``...`` removes a key."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in {**config, **values}.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


LLAMA, DEEPSEEK, QWEN = "llama", "deepseek_v3", "qwen3_moe, first layer dense"
SETTINGS: list[tuple[str, dict[str, Any], str]] = [
    (
        LLAMA,
        {"model_type": "gpt2"},
        "model_type=gpt2: Muster knows llama, mixtral, qwen3_moe, olmoe, deepseek",
    ),
    (LLAMA, {"architectures": ["LlamaForSequenceClassification"]}, "must be LlamaForCausalLM"),
    (LLAMA, {"attention_bias": True}, "attention_bias=True: Muster's projections have no bias"),
    (LLAMA, {"mlp_bias": True}, "mlp_bias=True: Muster's feed-forward layers have no bias"),
    (LLAMA, {"hidden_act": "gelu"}, "hidden_act=gelu: Muster's gated layers are SwiGLU"),
    (LLAMA, {"residual_multiplier": 0.5}, "residual_multiplier=0.5: is a setting that Muster does not know"),
    (LLAMA, {"hidden_size": "32"}, "hidden_size=32: must be a whole number"),
    (LLAMA, {"vocab_size": ...}, "vocab_size=None: must be a whole number"),
    (LLAMA, {"quantization_config": {"bits": 4}}, "the weights are quantised"),
    (LLAMA, {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type=dynamic: Muster has"),
    (
        LLAMA,
        {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "Muster rotates whole heads",
    ),
    (
        LLAMA,
        {"rope_scaling": {"type": "llama3", "factor": 8.0}, "rope_parameters": ...},
        "needs low_freq_factor",
    ),
    (
        LLAMA,
        {"rope_parameters": {"rope_type": "default", "scale": 2}},
        "scale=2: is no setting of rope_type=default",
    ),
    ("mixtral", {"sliding_window": 64}, "sliding_window=64: Muster attends to all earlier positions"),
    ("mixtral", {"num_experts": 8}, "num_local_experts and num_experts=[4, 8]: are two names of one thing"),
    (QWEN, {"use_sliding_window": True}, "use_sliding_window=True: Muster attends to all earlier positions"),
    (QWEN, {"mlp_only_layers": [1]}, "puts experts into the layers [0, 2]"),
    ("olmoe", {"clip_qkv": 8.0}, "clip_qkv=8.0: Muster does not clip queries, keys and values"),
    (DEEPSEEK, {"scoring_func": "softmax"}, "scoring_func=softmax: the experts of this family are scored by"),
    (DEEPSEEK, {"topk_method": "greedy"}, "topk_method=greedy"),
    (
        DEEPSEEK,
        {"rope_parameters": {"rope_type": "yarn", "factor": 8.0, "truncate": False}},
        "truncate=False: Muster rounds YaRN's range to whole dims",
    ),
]


@pytest.mark.parametrize(("variant", "values", "message"), SETTINGS, ids=[case[2][:40] for case in SETTINGS])
def test_settings(
    variant: str, values: dict[str, Any], message: str, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    assert message in refused(edited(saved(variant), tmp_path / "model", **values), tmp_path)


def rewrite(source: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy with other tensors."""
    shutil.copytree(source, folder)
    held = tensors(folder)
    change(held)
    save_file({name: value.contiguous() for name, value in held.items()}, folder / "model.safetensors")
    return folder


Q = "model.layers.1.self_attn.k_proj.weight"
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
TENSORS: list[tuple[str, Callable[[dict[str, torch.Tensor]], Any], str]] = [
    (LLAMA, lambda held: held.pop(Q), f"holds no tensor {Q}"),
    (DEEPSEEK, lambda held: held.pop(BIAS), f"holds no tensor {BIAS}"),
    (
        "mixtral",
        lambda held: held.pop("model.layers.2.block_sparse_moe.experts.3.w2.weight"),
        "holds no tensor model.layers.2.block_sparse_moe.experts.3.w2.weight",
    ),
    (LLAMA, lambda held: held.update({Q: held[Q].t()}), f"holds {Q} as [32, 16], not [16, 32]"),
    (
        LLAMA,
        lambda held: held.update({Q: held[Q].to(torch.int32)}),
        f"holds {Q} as I32, not one of F32, BF16",
    ),
    (
        LLAMA,
        lambda held: held.update({"model.layers.3.mlp.up_proj.weight": torch.ones(2)}),
        "holds a tensor model.layers.3.mlp.up_proj.weight, which has no place in the model",
    ),
    (
        "llama tied, stretched",
        lambda held: held.update({"lm_head.weight": held["model.embed_tokens.weight"] + 1}),
        "lm_head.weight is not model.embed_tokens.weight, though config.json ties them",
    ),
]


@pytest.mark.parametrize(("variant", "change", "message"), TENSORS, ids=[case[2][:60] for case in TENSORS])
def test_tensors(
    variant: str, change: Callable[[dict[str, torch.Tensor]], Any], message: str, saved: Any, tmp_path: Path
) -> None:
    assert message in refused(rewrite(saved(variant), tmp_path / "model", change), tmp_path)


def test_a_fused_tensor_with_an_expert_too_many(tmp_path: Path) -> None:
    fused = make("mixtral", tmp_path / "fused", save_original_format=False)
    name = "model.layers.1.mlp.experts.down_proj"

    def one_more(held: dict[str, torch.Tensor]) -> None:
        held[name] = torch.cat([held[name], held[name][:1]])

    message = refused(rewrite(fused, tmp_path / "model", one_more), tmp_path)
    assert f"holds 5 experts in {name}, not 4" in message


def test_what_is_left_behind_is_named_and_recorded(saved: Callable[[str], Path], tmp_path: Path) -> None:
    def with_more(held: dict[str, torch.Tensor]) -> None:
        held["model.layers.3.eh_proj.weight"] = torch.ones(2)
        held["lm_head.weight"] = held["model.embed_tokens.weight"].clone()

    source = rewrite(saved("llama tied, stretched"), tmp_path / "model", with_more)
    assert "drop=model.layers.9.*: matches no tensor" in refused(source, tmp_path, "drop=model.layers.9.*")
    import_([str(source), str(tmp_path / "run"), "device=cpu", "verify=false", "drop=model.layers.3.*"])
    found = json.loads((tmp_path / "run" / "huggingface" / "conversion.json").read_text())
    assert found["left_out"] == ["model.layers.3.eh_proj.weight"]
    assert found["copies"] == {"lm_head.weight": "model.embed_tokens.weight"}
    assert found["verification"] is None


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: cannot be read"),
    "config no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json: is not JSON"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "holds neither model.safetensors nor"),
    "cut": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-9]),
        "and is said to hold",
    ),
    "no safetensors": (
        lambda f: (f / "model.safetensors").write_bytes(b"\x80\x02}q\x00." * 9),
        "does not fit",
    ),
    "index of more": (
        lambda f: (f / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": dict.fromkeys(["x", *tensors(f)], "model.safetensors")})
        ),
        "lists x, which model.safetensors does not hold",
    ),
    "index of less": (
        lambda f: (f / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {Q: "model.safetensors"}})
        ),
        "holds lm_head.weight, which is said to be in None",
    ),
    "index to elsewhere": (
        lambda f: (f / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {Q: "../model.safetensors"}})
        ),
        "which is outside of this folder",
    ),
    "no tokenizer": (
        lambda f: (f / "tokenizer.json").unlink(),
        "holds no tokenizer.json. Fix: data.tokenizer",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_folders(name: str, saved: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved(LLAMA), tmp_path / "model"))
    harm, message = DAMAGE[name]
    harm(folder)
    assert message in refused(folder, tmp_path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.dim=64", "model.dim=64: the model's config.json says 32"),
        ("model=small", "model=small: comes with the import"),
        ("run.name=x", "run.name=x: comes with the import"),
        ("optim.lrr=1", "did you mean optim.lr=1"),
        ("verify=maybe", "verify=maybe: must be true or false"),
        ("tolerance=0", "tolerance=0: must be a number above 0"),
    ],
)
def test_overrides(override: str, message: str, saved: Callable[[str], Path], tmp_path: Path) -> None:
    assert message in refused(saved(LLAMA), tmp_path, override)


def test_the_bias_of_a_router_needs_its_buffer(saved: Callable[[str], Path], tmp_path: Path) -> None:
    message = refused(saved(DEEPSEEK), tmp_path, "layout.balance.bias_update_rate=0")
    assert "e_score_correction_bias, which has no place in the model" in message


def test_a_wrong_name_map_does_not_pass(
    saved: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = dict(OLMOE.names)
    gate, up = "feed_forward.experts.w1", "feed_forward.experts.w3"
    names[gate], names[up] = names[up], names[gate]
    monkeypatch.setitem(families.FAMILIES, "olmoe", dataclasses.replace(OLMOE, names=names))
    with pytest.raises(ConfigError, match=r"tolerance=1e-05: the logits differ by .* of the largest one"):
        import_([str(saved("olmoe")), str(tmp_path / "run"), "device=cpu"])
    assert list(tmp_path.iterdir()) == []


def test_without_transformers(
    saved: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        verify.importlib.util, "find_spec", lambda name: None if name == "transformers" else find(name)
    )
    with pytest.raises(
        ConfigError, match=r"not installed\. Fix: pip install 'muster-moe\[hf\]', or verify=false"
    ):
        import_([str(saved(LLAMA)), str(tmp_path / "run"), "device=cpu"])
    import_([str(saved(LLAMA)), str(tmp_path / "run"), "device=cpu", "verify=false"])


def test_too_large_to_compare() -> None:
    with pytest.raises(ConfigError, match=r"400,000,000,000,000 bytes, and .* bytes of memory are free"):
        verify.check_possible(10**14)


UNLIKE = [
    (
        ["layout=switch"],
        "layout.renormalize=False: no family can express this model; the nearest, mixtral, has",
    ),
    (["layout=mixtral", "layout.capacity_factor=2"], "layout.capacity_factor=2.0: no family can express"),
    (["layout=dense", "model.activation=gelu"], "model.activation=gelu: no family can express"),
    (["layout=mixtral", "layout.num_shared_experts=1"], "layout.num_shared_experts=1: no family can express"),
    (["layout=deepseek"], "no family can express this model"),
    (
        ["layout=gshard"],
        "layout.capacity_factor=1.25: no family can express this model; the nearest, mixtral",
    ),
    (["layout=hierarchical"], "layout.router=hierarchical: no family can express"),
    (["layout=hash"], "layout.router=hash: no family can express"),
    (["layout=ernie"], "layout.expert_sizes=[ExpertSize("),
    (["layout=moe_plus_plus"], "layout.num_zero_experts="),
]


@pytest.mark.parametrize(("overrides", "message"), UNLIKE, ids=[" ".join(case[0]) for case in UNLIKE])
def test_runs_that_no_family_expresses(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        family_for(resolve(compose(overrides), Machine(num_cpus=1)))
    assert message in str(caught.value)


MLA = "model.mla={q_lora_rank: 24, kv_lora_rank: 16, qk_nope_head_dim: 8, qk_rope_head_dim: 4, v_head_dim: 8}"
BADLY_WRITTEN = [
    (
        ["layout=deepseek", "model.attention=mla", MLA],
        "this family's latent norms use 1e-06, and this run's 1e-05",
    ),
    (
        ["layout=deepseek", "model.attention=mla", MLA, "model.norm_eps=1e-6", "layout.num_shared_experts=0"],
        "this family has at least one",
    ),
    (
        ["layout=mixtral", "model.qk_norm=full", "model.head_dim=32"],
        "heads are model.dim / num_heads = 64 wide",
    ),
    (["layout=dense", "model.num_heads=6", "model.head_dim=32"], "heads divide model.dim = 256"),
]


@pytest.mark.parametrize(("overrides", "message"), BADLY_WRITTEN, ids=[case[1] for case in BADLY_WRITTEN])
def test_what_a_family_cannot_write(overrides: list[str], message: str) -> None:
    config = resolve(compose(overrides), Machine(num_cpus=1))
    with pytest.raises(ConfigError, match=message):
        family_for(config).write(config)


def test_exports_that_cannot_be(saved: Callable[[str], Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    import_([str(saved(LLAMA)), str(run), "device=cpu", "verify=false"])
    for arguments, message in (
        ([str(run), str(tmp_path / "out"), "dtype=fp8"], "dtype=fp8: must be auto, fp32, bf16 or fp16"),
        ([str(run), str(tmp_path / "out"), "shard_size=5"], "must be a size such as 500MB or 5GB"),
        ([str(run), str(tmp_path / "out"), "shards=5GB"], "did you mean shard_size=…"),
        ([str(run), str(run)], "is there already"),
        ([str(run)], "which run, to where?"),
        ([str(tmp_path / "no"), str(tmp_path / "out")], "does not exist"),
    ):
        with pytest.raises(ConfigError) as caught:
            export(arguments)
        assert message in str(caught.value)
    config = load_frozen(run / "config.yaml")
    config.model.num_layers = 4
    freeze(config, run / "config.yaml")
    with pytest.raises(ConfigError, match=r"holds no tensor layers\.3\.[a-z_.]+, unlike the model"):
        export([str(run), str(tmp_path / "out"), "verify=false"])
    shard = run / "checkpoints" / "step-00000000" / "shard-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ConfigError, match=r"shard-00000\.safetensors has changed"):
        export([str(run), str(tmp_path / "out"), "verify=false"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_fp16_that_would_overflow(saved: Callable[[str], Path], tmp_path: Path) -> None:
    def large(held: dict[str, torch.Tensor]) -> None:
        held["model.norm.weight"][3] = 1e5

    source = rewrite(saved(LLAMA), tmp_path / "model", large)
    import_([str(source), str(tmp_path / "run"), "device=cpu", "verify=false"])
    with pytest.raises(
        ConfigError, match=r"model\.norm\.weight has values beyond its range\. Fix: dtype=bf16"
    ):
        export([str(tmp_path / "run"), str(tmp_path / "out"), "dtype=fp16", "verify=false"])
