"""The adapters alone, for `peft`: a small file beside the pretrained language model that they are for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from kd_lightning.export.formats import Written
from kd_lightning.export.graph import in_precision
from kd_lightning.models.causal_lm import CausalLM, causal_lm
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
    # the names of a `PeftModel`, which holds the pretrained model as base_model.model
    save_file({f"base_model.model.{name}": weight.contiguous() for name, weight in state.items()}, folder / FILE)
    config = network.network.peft_config["default"]
    config.base_model_name_or_path = read_stage(source.stage)["settings"]["network"]["name"]
    config.inference_mode = True
    config.save_pretrained(str(folder))
    return Written(["input_ids", "attention_mask"])


def load(folder: Path, exported: Exported, threads: int | None = None) -> nn.Module:
    """Load the pretrained model, put the adapters into it, and merge them."""
    from peft import PeftModel

    name = str(read_json(folder / "adapter_config.json")["base_model_name_or_path"])
    size = task_of(exported.predicts).outputs
    try:
        base: Any = causal_lm(name, size)
    except ConfigError as error:
        raise KDError(f"{folder} has adapters alone, and the model that they are for is not there: {error}") from error
    whole: Any = PeftModel.from_pretrained(base.network, str(folder), local_files_only=True)
    return CausalLM(whole.merge_and_unload(), size).eval()
