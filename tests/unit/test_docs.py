"""What README and docs/ say is so: links, commands, examples, tables."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from bench import readme
from docs import draw_layouts
from launch import evaluate, sweep
from launch.__main__ import HELP
from launch.inference import layout_for
from launch.resume import refill
from launch.sample import SamplingOptions, parse_options
from launch.train import split_arguments
from parallel.dispatch.local import LocalDispatcher
from parallel.engines.base import whole_state
from tests.command import MUSTER, SMALL, Workplace
from trainer import layouts, reference
from trainer import overrides as grammar
from trainer.build import build_model
from trainer.compose import apply_overrides, compose
from trainer.config import Machine, RunConfig, resolve
from trainer.config_moe import BalanceScope, LayoutConfig, RouterName
from trainer.faults.kinds import KINDS
from trainer.models.cost import model_cost, places_reached
from trainer.models.init import initialise
from trainer.rules import validate

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
LAYOUTS = ROOT / "docs" / "layouts.md"
MACHINE = Machine(num_cpus=8, num_gpus=8)
_FENCED = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_NAMED = re.compile(r"^`([\w./]+)`\n\n```\w+\n(.*?)^```", re.MULTILINE | re.DOTALL)


def heading_anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), target
        assert not anchor or anchor in heading_anchors(file), target


def test_every_page_is_reached_from_the_readme() -> None:
    reached, new = set(), {ROOT / "README.md"}
    while new:
        page = new.pop()
        reached.add(page)
        links = re.findall(r"\]\(([^)#\s]+\.md)", page.read_text())
        new |= {(page.parent / link).resolve() for link in links if "://" not in link} - reached
    assert set(PAGES) <= reached


def commands() -> Iterator[tuple[str, list[str]]]:
    """(page, words) of every line in a bash block."""
    for page in PAGES:
        for language, body in _FENCED.findall(page.read_text()):
            if language != "bash":
                continue
            for line in body.replace("\\\n", " ").splitlines():
                inner = re.fullmatch(r'eval "\$\((.+)\)"', line)
                for part in (inner[1] if inner else line).split(" && "):
                    yield page.name, shlex.split(part, comments=True)


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the named files of docs/extending.md."""
    folder = tmp_path_factory.mktemp("examples")
    found = _NAMED.findall((ROOT / "docs" / "extending.md").read_text())
    assert len(found) == 6
    for name, body in found:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(body)
    return folder


COMMANDS = [pytest.param(words, id=f"{page}: {' '.join(words)}") for page, words in commands()]


@pytest.mark.parametrize("words", COMMANDS)
def test_command_lines_are_valid(words: list[str], examples: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(examples)
    check_command(words, examples)


def check_command(words: list[str], folder: Path) -> None:
    while words and re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    match words:
        case ["printf" | "echo", *_]:
            pass
        case ["git", "clone", *_] | ["cd", _] | ["source", ".venv/bin/activate"]:
            pass
        case ["make", target, *_]:
            assert re.search(rf"^{target}:.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)
        case ["muster", "train" | "verify" | "chaos", *arguments]:
            check_train(arguments, folder)
        case ["muster", "resume", _, *overrides]:
            check_resume(overrides)
        case ["muster", "generate", _, *options]:
            check_layout(parse_options(options)[1])
        case ["muster", "evaluate", _, *arguments]:
            check_evaluate(arguments)
        case ["pip", "install", package]:
            assert (
                package == "muster-moe[eval]" and 'eval = ["lm-eval' in (ROOT / "pyproject.toml").read_text()
            )
        case ["muster", command, *_]:
            assert re.search(rf"^  muster {command}\b", HELP, re.MULTILINE)
        case ["torchrun", *arguments]:
            check_torchrun(arguments)
        case ["deepspeed" | "accelerate" | "srun", *arguments]:
            check_worker(arguments[arguments.index("trainer") + 1 :], 2, 1)
        case _:
            raise AssertionError(f"a command that this test does not know: {words}")


def check_train(arguments: list[str], folder: Path) -> None:
    _, overrides, args = split_arguments(arguments)
    if args.multirun:
        sweep.check([*overrides, f"run.root={folder / 'runs'}"], args.config_dir)
    else:
        config = compose(overrides, args.config_dir)
        if config.launcher.nnodes == -1:  # as many as the hostfile has
            config.launcher.nnodes = 2
        if config.chaos.nodes:  # `muster chaos` sets the nodes up
            config.launcher.nnodes, config.launcher.master_addr = config.chaos.nodes, "node-0"
        validate(resolve(config, MACHINE))


def check_resume(overrides: list[str]) -> None:
    asked = compose(["experiment=quickstart"])
    changed = {override.key_or_group for override in grammar.parse(overrides)}
    config = refill(apply_overrides(resolve(asked, MACHINE), overrides), asked, changed)
    validate(resolve(config, MACHINE))


def check_layout(overrides: list[str]) -> None:
    config = resolve(compose(["device=cpu", "train.micro_batch=8"]), MACHINE)
    layout_for(config, ["device=cpu", *overrides])


def check_evaluate(arguments: list[str]) -> None:
    asked = evaluate.parse(arguments)
    config = resolve(compose(["device=cpu", "train.micro_batch=8"]), MACHINE)
    config.data = config.data if asked.own_data else evaluate.other_data(config.data, asked.data)
    layout_for(config, ["device=cpu", *asked.others])


def check_torchrun(arguments: list[str]) -> None:
    at = arguments.index("-m")
    assert arguments[at + 1] == "trainer"
    flags = dict(flag.lstrip("-").split("=") for flag in arguments[:at])
    check_worker(arguments[at + 2 :], int(flags["nnodes"]), int(flags["nproc-per-node"]))
    assert "rdzv-id" in flags or any(argument.startswith("run.id=") for argument in arguments)


def check_worker(overrides: list[str], nnodes: int, nproc_per_node: int) -> None:
    config = compose(overrides)
    config.launcher.nnodes, config.launcher.nproc_per_node = nnodes, nproc_per_node
    validate(resolve(config, MACHINE))


def test_every_kind_of_fault_is_in_the_page() -> None:
    page = (ROOT / "docs" / "chaos.md").read_text()
    for name, kind in KINDS.items():
        assert f"| `{name}` | {kind.what} |" in page


def test_a_wrong_command_line_would_be_found(tmp_path: Path) -> None:
    for line in (
        "muster train optim.lrr=1",
        "muster verifi",
        "muster verify optim.lrr=1",
        "make trian",
        "ls",
        "muster resume R layout=dense",
        "muster generate R temprature=1",
        "muster evaluate R data.pth=x",
        "muster evaluate R data=txt",
    ):
        with pytest.raises((ValueError, AssertionError)):
            check_command(line.split(), tmp_path)


def small(*overrides: str) -> RunConfig:
    own = [o for o in SMALL if not o.startswith("data=")]
    config = resolve(compose([*own, *overrides]), Machine(num_cpus=2))
    validate(config)
    return config


@pytest.mark.parametrize(
    "overrides",
    [
        ["layout=dense", "layout.target=my_layers:SquaredRelu", "layout.kwargs.width=64"],
        ["layout=mixtral", "layout.target=my_layers:DenseBesideExperts", "layout.kwargs.width=64"],
        ["layout=dense", "model.target=my_models:ConvolutionalModel", "model.kwargs.width=3"],
    ],
    ids=lambda overrides: overrides[1],
)
def test_example_models_learn(overrides: list[str], examples: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(examples)
    config = small(*overrides)
    model = build_model(config, LocalDispatcher())
    assert all(parameter.is_meta for parameter in model.parameters())
    model.to_empty(device="cpu")
    initialise(model, whole_state(model), seed=0)
    tokens = torch.arange(2 * 33).view(2, 33) % 50
    losses = [learn(model, tokens) for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]
    assert model(tokens[:, :-1]).shape == (2, 32, config.model.vocab_size)


def learn(model: nn.Module, tokens: torch.Tensor) -> float:
    """One step of gradient descent on one batch; its loss before."""
    documents = torch.zeros(2, 32, dtype=torch.int32)
    loss = model(tokens[:, :-1], tokens[:, 1:], documents).cross_entropy / 64
    loss.backward()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            parameter.sub_(0.03 * parameter.grad.sign())
            parameter.grad = None
    return float(loss.detach())


def test_examples_work_in_a_real_run(examples: Path) -> None:
    rows = [f'{i},"What is {i} plus {i}, my dear?",It is {2 * i} as far as I know.' for i in range(200)]
    (examples / "questions.csv").write_text("\n".join(["id,question,answer", *rows]))
    place = Workplace(examples)
    place.run(
        MUSTER,
        "train",
        *[override for override in SMALL if not override.startswith("data=")],
        "layout=mixtral",
        "layout.target=my_layers:DenseBesideExperts",
        "layout.kwargs.width=64",
        "data.target=my_data:questions",
        "data.path=questions.csv",
        'callbacks=[{target: "my_callbacks:WeightNorm", kwargs: {every: 2}}]',
        "train.steps=4",
        "launcher.nproc_per_node=2",
        "parallel.ep=2",
    )
    records = {r["step"]: r for r in place.records("metrics.jsonl")}
    assert [step for step, r in records.items() if "user/weight_norm" in r] == [2, 4]
    assert records[4]["user/largest_norm"] >= records[4]["user/weight_norm"] > 0
    manifest = (place.run_dir / "checkpoints" / "step-00000004" / "manifest.json").read_text()
    assert "largest" in manifest and "feed_forward.dense.w1.weight" in manifest


def table(page: Path, first: str) -> list[list[str]]:
    """Cells of the table whose header begins with ``first``, without header and backquotes."""
    text = page.read_text()
    body = text[text.index(f"| {first} |") :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in body]


def test_table_of_layouts_is_that_of_conf() -> None:
    rows = table(ROOT / "README.md", "layout")
    assert sorted(row[0] for row in rows) == layouts.layout_names()
    for row in rows:
        assert row[1:7] == described(layouts.layout_config(row[0]).layout), row[0]


def test_figures_of_speed_are_those_of_the_results() -> None:
    assert readme.section() in (ROOT / "README.md").read_text()


def test_table_of_sampling_options_is_that_of_the_code() -> None:
    rows = {name: default for name, default, _ in table(ROOT / "docs" / "using.md", "option")}
    shown = {"None": "none", "False": "false"}
    defaults = {name: str(value) for name, value in vars(SamplingOptions()).items()}
    assert rows == {name: shown.get(value, value) for name, value in defaults.items()}


def described(layout: LayoutConfig) -> list[str]:
    if not layout.num_experts:
        return ["0", "–", "0", "–", "–", "–"]
    balance = layout.balance
    parts = {"loss": balance.coefficient, "z-loss": balance.router_z, "bias": balance.bias_update_rate}
    by = {"hierarchical": "two levels", "sinkhorn": "balanced", "expert_choice": "experts choose"}
    extra = {"zero": layout.num_zero_experts, "copy": layout.num_copy_experts}
    sizes = [size.num for size in layout.expert_sizes] or [layout.num_experts]
    scores = [
        layout.score.value,
        "renormalised" if layout.renormalize else "",
        by.get(layout.router.value, ""),
    ]
    return [
        " + ".join([*map(str, sizes), *(f"{number} {kind}" for kind, number in extra.items() if number)]),
        str(layout.top_k),
        str(layout.num_shared_experts),
        "hash" if layout.router is RouterName.hash else ", ".join(filter(None, scores)),
        "none" if layout.capacity_factor is None else f"capacity {layout.capacity_factor}",
        ", ".join(
            f"{name} {value:.4f}".rstrip("0") + (" by step" if name == "loss" and by_step(layout) else "")
            for name, value in parts.items()
            if value
        )
        or "none",
    ]


def by_step(layout: LayoutConfig) -> bool:
    return layout.balance.scope is BalanceScope.step


def test_costs_of_layouts_are_those_of_the_code() -> None:
    text = LAYOUTS.read_text()
    assert text == layouts.filled(text), "fill them in again: python -m trainer.layouts docs/layouts.md"


def test_every_layout_has_a_section_and_a_picture_of_it() -> None:
    sections = re.findall(
        r"^## (\w+)\n\n!\[[^]]+\]\((\S+)\)\n(.*?)^(?=## )", LAYOUTS.read_text(), re.M | re.S
    )
    assert sorted(name for name, *_ in sections) == layouts.layout_names()
    for name, path, text in sections:
        assert f"<!-- cost: {name} -->" in text and f"muster train layout={name} " in text
        picture = ROOT / "docs" / path
        assert picture.stem == name and picture.stat().st_size < 60_000
        with Image.open(picture) as image:
            drawn = image.info["Description"]
        assert drawn == layouts.drawn_from(layouts.layout_config(name)), (
            f"draw it again: python -m docs.draw_layouts {name}"
        )


def test_a_layout_is_drawn_as_its_picture_says(tmp_path: Path) -> None:
    with (
        Image.open(draw_layouts.draw("switch", tmp_path)) as new,
        Image.open(ROOT / "docs" / "images" / "layouts" / "switch.png") as kept,
    ):
        assert (new.size, new.info["Description"]) == (kept.size, kept.info["Description"])
        assert len(new.convert("RGB").getcolors(1 << 20)) > 20, "an empty picture"


def test_the_table_of_groups_and_nodes() -> None:
    layout = layouts.layout_config("hierarchical").layout
    rows = [[int(cell) for cell in row] for row in table(LAYOUTS, "`parallel.ep`")]
    assert len(rows) == 5
    for ep, nproc_per_node, num_nodes, reached in rows:
        assert ep // nproc_per_node == num_nodes
        assert places_reached(layout, ep, nproc_per_node) == reached


def test_table_of_sizes_is_that_of_the_code() -> None:
    rows = table(ROOT / "README.md", "model")
    assert {row[0] for row in rows} == {path.stem for path in (ROOT / "conf" / "model").glob("*.yaml")}
    for name, layout, *said in rows:
        chosen = [] if layout == "its own" else [f"layout={layout}"]
        config = resolve(compose([f"model={name}", *chosen]), Machine(num_cpus=2))
        cost = model_cost(build_model(config, LocalDispatcher()), config)
        assert said == [amount(cost.num_parameters), amount(cost.num_active)], name


def amount(number: int) -> str:
    return f"{number / 1e6:.1f} M" if number < 1e9 else f"{number / 1e9:.2f} B"


def test_the_page_of_fields_is_printed_from_the_code() -> None:
    assert (ROOT / "docs" / "configuration.md").read_text() == reference.page(), (
        "print it again: python -m trainer.reference > docs/configuration.md"
    )


def test_every_field_has_one_meaning() -> None:
    page = reference.page()
    listed = re.findall(r"^\| `([\w.]+)` \| .+ \| .+ \| (.+) \|$", page, re.MULTILINE)
    names = [name for name, _ in listed]
    values = {
        key for key, kind in grammar.schema_types().items() if not hasattr(kind, "__dataclass_fields__")
    }
    assert sorted(names) == sorted(values)
    assert all(meaning.strip() for _, meaning in listed)
    assert set(reference.MEANINGS) <= set(names), "meanings of fields that are gone"
