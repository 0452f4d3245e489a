"""The adapters alone, for `peft`: a small file beside the pretrained language model that they are for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from kd_lightning.export.formats import Written
from kd_lightning.export.graph import in_precision
from kd_lightning.models.causal_lm import CausalLM, causal_lm
from kd_lightning.models.lora import Lora, merged
from kd_lightning.runtime.errors import ConfigError, KDError
from kd_lightning.runtime.fingerprints import read_json
from kd_lightning.tasks import task_of
from kd_lightning.training.run_folder import read_stage

if TYPE_CHECKING:
    from kd_lightning.export.exported import Exported
    from kd_lightning.export.source import Source
    from kd_lightning.training.run_folder import TrainedModel

FILE = "adapter_model.safetensors"
QUANTIZE = ("none", "fp16", "bf16")
NEEDS: tuple[str, ...] = ("peft",)
READS: tuple[str, ...] = ("peft",)

OUTSIDE = "base_model.model."
"""What names begin with in the file: a `PeftModel` holds the pretrained model there."""


def check(model: TrainedModel) -> None:
    """Refuse a student without adapters."""
    if not (isinstance(model.network, CausalLM) and model.network.lora):
        raise ConfigError(
            f"--format peft: this {type(model.network).__name__} has no adapters; train one with "
            "model@student=causal_lm_lora, or use huggingface"
        )


def write(source: Source, quantize: str, folder: Path) -> Written:
    """Write the adapters and `adapter_config.json`, which names the pretrained model."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    network: Any = in_precision(source.model.network, quantize)
    state = get_peft_model_state_dict(network.network, adapter_name="default")
    save_file({f"{OUTSIDE}{name}": weight.contiguous() for name, weight in state.items()}, folder / FILE)
    config = network.network.peft_config["default"]
    config.base_model_name_or_path = read_stage(source.stage)["settings"]["network"]["name"]
    config.inference_mode = True
    config.save_pretrained(str(folder))
    return Written(["input_ids", "attention_mask"])


def load(folder: Path, exported: Exported, threads: int | None = None) -> nn.Module:
    """Load the pretrained model, put the adapters into it, and merge them.

    Of the configuration only what `write` decides is read: a foreign one could name code.
    """
    from safetensors.torch import load_file

    config = read_json(folder / "adapter_config.json")
    lora = Lora(config["r"], config["lora_alpha"], config["lora_dropout"], config["target_modules"])
    size = task_of(exported.predicts).outputs
    try:
        base = causal_lm(str(config["base_model_name_or_path"]), size)
    except ConfigError as error:
        raise KDError(f"{folder} has adapters alone, and the model that they are for is not there: {error}") from error
    model = CausalLM(base.network, size, lora=lora)
    state = {f"network.{_inside(name)}": weight for name, weight in load_file(folder / FILE).items()}
    lacking = model.load_state_dict(state, strict=False)
    if lacking.unexpected_keys or any("lora_" in name for name in lacking.missing_keys):
        raise KDError(f"{folder / FILE} holds other adapters than its configuration describes: export it again")
    return merged(model).eval()


def _inside(name: str) -> str:
    """Return an adapter's name within the model, by that in the file."""
    return (
        name.removeprefix(OUTSIDE)
        .replace(".lora_A.weight", ".lora_A.default.weight")
        .replace(".lora_B.weight", ".lora_B.default.weight")
    )
