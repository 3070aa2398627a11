"""What ``muster generate`` and ``muster evaluate`` have done: in their own process, or by the ranks of a job.

A job is a folder: ``config.yaml`` (the layout), ``job.json`` (what is asked), and after it ``answers.json``.
"""

from __future__ import annotations

import gc
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from parallel.mesh import build_meshes
from trainer.build import Inference, load_for_inference
from trainer.checkpoint.resume import Checkpoint, open_checkpoint
from trainer.compose import write_atomically
from trainer.config import Device, RunConfig, parallel_dims
from trainer.draws import Sampling
from trainer.evaluation import documents_loss, held_out_loss, own_data
from trainer.generation import complete
from trainer.harness import Tasks, run_tasks
from trainer.run import Place, join_ranks

JOB, ANSWERS = "job.json", "answers.json"


@dataclass(frozen=True)
class Job:
    """What is asked of a checkpoint: exactly one of the last four.

    Attributes:
        prompts: texts to go on with; of an empty one the model begins a document.
        own_data: the loss on the rows that the run held out.
        fraction: the loss on the documents of ``config.data`` whose draw is below it.
        tasks: of the harness.
        sampling, batch_size: for prompts; ``batch_size`` counts rows of a rank.
    """

    checkpoint: str
    prompts: list[str] | None = None
    own_data: bool = False
    fraction: float | None = None
    tasks: Tasks | None = None
    sampling: Sampling = field(default_factory=Sampling)
    batch_size: int = 16

    def save(self, folder: Path) -> None:
        """Write it for the ranks."""
        write_atomically(folder / JOB, json.dumps(asdict(self)))

    @classmethod
    def load(cls, folder: Path) -> Job:
        """What :meth:`save` wrote."""
        found: dict[str, Any] = json.loads((folder / JOB).read_text())
        found["sampling"] = Sampling(**found["sampling"])
        found["tasks"] = None if found["tasks"] is None else Tasks(**found["tasks"])
        return cls(**found)


def run_alone(job: Job, config: RunConfig, checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """Do a job in this process; its answers.

    Raises:
        ConfigError: an input that cannot work.
    """
    torch.set_num_threads(config.train.num_threads)
    device = torch.device("cuda" if config.device is Device.cuda else "cpu")
    return answer(job, load_for_inference(checkpoint, config, device))


def run_job(config: RunConfig, folder: Path, place: Place) -> None:
    """Do the job in ``folder`` as one of its ranks; rank 0 writes the answers.

    Raises:
        ConfigError: an input that cannot work.
    """
    torch.set_num_threads(config.train.num_threads)
    device, _ = join_ranks(config, place)
    meshes = build_meshes(parallel_dims(config), device.type)
    gc.enable()  # trainer/__main__.py turned it off for the imports
    job = Job.load(folder)
    checkpoint = open_checkpoint(Path(job.checkpoint), verify=False)  # files are verified when they are read
    answers = answer(job, load_for_inference(checkpoint, config, device, meshes))
    if place.rank == 0:
        write_atomically(folder / ANSWERS, json.dumps(answers))


def answer(job: Job, inference: Inference) -> list[dict[str, Any]]:
    """One JSON-able record a prompt, or a single one. Collective where there are ranks."""
    model, config = inference.model, inference.config
    tokenizer, device = inference.tokenizer, inference.device
    if job.prompts is not None:
        found = complete(
            model,
            [tokenizer.encode(prompt) or [tokenizer.eos] for prompt in job.prompts],
            job.sampling,
            eos=tokenizer.eos,
            context=config.train.seq_len,
            device=device,
            batch_size=job.batch_size,
        )
        return [
            {
                "prompt": prompt,
                "text": tokenizer.decode(text.tokens),
                "num_tokens": len(text.tokens),
                "finish": text.finish,
            }
            for prompt, text in zip(job.prompts, found, strict=True)
        ]
    if job.tasks is not None:
        return [run_tasks(inference, job.tasks)]
    if job.own_data:
        prepared = own_data(inference.checkpoint, config, tokenizer)
        return [asdict(held_out_loss(model, prepared, config, device))]
    assert job.fraction is not None
    return [asdict(documents_loss(model, tokenizer, config, job.fraction, device))]
