"""Models of transformers come in and go out: the same logits and gradients, and the same bytes again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from interop_helpers import VARIANTS, make, mixtral, same_bytes, save, tensors
from torch import Tensor, nn

from launch.convert import export, import_
from trainer.build import load_for_inference
from trainer.checkpoint.resume import open_checkpoint
from trainer.compose import load_frozen
from trainer.interop.families import FAMILIES, make_pieces
from trainer.interop.hf import model_state
from trainer.interop.verify import TOLERANCE


def cross_entropy(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


def gradients_on_disk(folder: Path, tokens: Tensor, scratch: Path) -> dict[str, Tensor]:
    """One backward pass of transformers, saved as if the gradients were the weights."""
    model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    cross_entropy(model(tokens).logits, tokens).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.copy_(parameter.grad)
    model.save_pretrained(scratch)
    return tensors(scratch)


@pytest.mark.parametrize("variant", VARIANTS)
def test_in_and_out_again(variant: str, tmp_path: Path) -> None:
    source, run = make(variant, tmp_path / "model"), tmp_path / "runs" / "imported" / "a"
    said = import_([str(source), str(run), "device=cpu"]).message
    found = json.loads((run / "huggingface" / "conversion.json").read_text())
    assert found["verification"]["relative"] <= TOLERANCE == 1e-5
    assert found["verification"]["max_abs_logit"] > 0.5 and "logits equal those of transformers" in said

    stored = tensors(source)
    assert sorted(row["hf"] for row in found["tensors"]) == sorted(stored), "every tensor, once"
    assert sum(row["hf_dtype"] == "F32" for row in found["tensors"]) == len(stored)

    tokens = torch.randint(0, 264, (2, 40), generator=torch.Generator().manual_seed(1))
    expected = gradients_on_disk(source, tokens, tmp_path / "gradients")
    checkpoint, config = open_checkpoint(run), load_frozen(run / "config.yaml")
    ours = load_for_inference(checkpoint, config, torch.device("cpu"))
    cross_entropy(ours.model(tokens), tokens).backward()
    state = dict(ours.model.named_parameters())
    shapes = {name: piece.global_shape for name, piece in model_state(ours.config).items()}
    family = FAMILIES[found["family"]]
    values = json.loads((source / "config.json").read_text())
    compared = 0
    for piece in make_pieces(family, ours.config, values, shapes):
        if piece.muster.endswith("bias_E"):
            continue  # it has no gradient on either side
        gradient = state[piece.muster].grad
        assert gradient is not None
        box = gradient[tuple(slice(o, o + n) for o, n in zip(piece.offsets, piece.shape, strict=True))]
        theirs = expected[piece.hf.name]
        error = (piece.change.to_hf(box) - theirs).norm() / theirs.norm().clamp(min=1e-30)
        assert error <= 1e-4, f"{piece.hf.name}: {error:.1e}"
        compared += 1
    moe_every_step = [name for name in shapes if name.endswith("load_E")]  # qwen3_moe balances by step
    assert found["fresh"] == moe_every_step and bool(moe_every_step) is variant.startswith("qwen3_moe")
    assert compared >= len(stored) - 3

    export([str(run), str(tmp_path / "back")])
    again = tensors(tmp_path / "back")
    settings = json.loads((tmp_path / "back" / "config.json").read_text())
    assert settings.pop("num_nextn_predict_layers", 0) == 0, "its layer did not come along"
    assert all(values[key] == value for key, value in settings.items() if key != "torch_dtype")
    assert again.keys() == stored.keys()
    assert [name for name in stored if not same_bytes(again[name], stored[name])] == []


def test_bf16_sharded_by_other_sizes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = save(mixtral(), tmp_path / "model", torch.bfloat16, max_shard_size="50KB")
    assert len(list(source.glob("model-*.safetensors"))) > 3
    run = tmp_path / "run"
    import_([str(source), str(run), "device=cpu"])
    entries = json.loads((run / "checkpoints" / "step-00000000" / "manifest.json").read_text())["tensors"]
    assert {entry["dtype"] for entry in entries.values()} == {"F32"}
    export([str(run), str(tmp_path / "back"), "shard_size=1GB"])
    assert [path.name for path in (tmp_path / "back").glob("*.safetensors")] == ["model.safetensors"]
    stored, again = tensors(source), tensors(tmp_path / "back")
    assert again.keys() == stored.keys() and all(same_bytes(again[name], stored[name]) for name in stored)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    export([str(run), str(tmp_path / "wide"), "dtype=fp32"])
    assert all(torch.equal(wide, stored[name].float()) for name, wide in tensors(tmp_path / "wide").items())


@pytest.mark.parametrize("variant", ["mixtral", "deepseek_v3"])
def test_the_fused_form(variant: str, tmp_path: Path) -> None:
    published = make(variant, tmp_path / "published")
    fused = make(variant, tmp_path / "fused", save_original_format=False)
    stored = tensors(fused)
    assert any(name.endswith("experts.gate_up_proj") for name in stored)
    import_([str(fused), str(tmp_path / "run"), "device=cpu"])
    export([str(tmp_path / "run"), str(tmp_path / "back")])
    expected, again = tensors(published), tensors(tmp_path / "back")
    assert again.keys() == expected.keys()
    assert all(same_bytes(again[name], expected[name]) for name in expected)


@pytest.mark.parametrize("part_bytes", [1, 20_000])
def test_the_size_of_the_parts_does_not_matter(part_bytes: int, tmp_path: Path) -> None:
    from trainer.interop import hf_import

    source = make("deepseek_v3", tmp_path / "model")
    digests = []
    for name, size in (("one", 1 << 30), ("many", part_bytes)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(hf_import, "_PART_BYTES", size)
            import_([str(source), str(tmp_path / name), "device=cpu", "verify=false"])
        checkpoint = open_checkpoint(tmp_path / name)
        digests.append(checkpoint.weights_digest)
    assert checkpoint.world_size > 10 and digests[0] == digests[1]
