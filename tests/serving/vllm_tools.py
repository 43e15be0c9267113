"""What the tests of vLLM share: adapters with weights that matter, and a process that always ends."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from pathlib import Path
from typing import Any


def make_adapter(checkpoint: Path, folder: Path, seed: int = 0, rank: int = 4, **overrides: object) -> Path:
    """A PEFT adapter on the language model's linears whose B is not zero, so that it changes every answer."""
    import torch
    from peft import LoraConfig, get_peft_model

    from audio_llm.model.build import load_model
    from audio_llm.model.validate import LORA_TARGETS

    torch.manual_seed(seed)
    options = dict(r=rank, lora_alpha=2 * rank, target_modules=LORA_TARGETS, task_type="CAUSAL_LM") | overrides
    model = get_peft_model(load_model(checkpoint), LoraConfig(**options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder


def adapted_encoder(checkpoint: Path, folder: Path, rank: int = 4, forms: tuple[str, ...] = ("merged",)) -> Any:
    """`checkpoint` with adapters of its encoder that matter, not folded in; exported with them to `folder`."""
    import torch

    from audio_llm.model.build import load_model, load_processor
    from audio_llm.model.export import export_weights
    from audio_llm.training.policy import make_trainable
    from audio_llm.training.recipes import LoRARecipe, TrainedParts

    train, lora = TrainedParts(encoder="lora"), LoRARecipe(rank=rank, alpha=2 * rank)
    model = make_trainable(load_model(checkpoint), train, lora)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    export_weights(model, model.state_dict(), load_processor(checkpoint), folder, forms)
    return model.eval()


def descendants(pid: int) -> set[int]:
    """Process ids of all children of `pid`, and theirs."""
    found, waiting = set(), [pid]
    while waiting:
        listing = subprocess.run(["pgrep", "-P", str(waiting.pop())], capture_output=True, text=True, check=False)
        children = {int(line) for line in listing.stdout.split()}
        waiting += sorted(children - found)
        found |= children
    return found


def alive(pid: int) -> bool:
    """True for a process that runs; a zombie, which only waits for its parent to look, does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def end(process: subprocess.Popen[bytes], patience: float = 20) -> None:
    """Stop a process and everything below it, whatever state it is in."""
    family = {process.pid} | descendants(process.pid)
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(patience)
    for pid in family:
        if alive(pid):
            os.kill(pid, signal.SIGKILL)
    process.wait(patience)
