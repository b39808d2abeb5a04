"""Parts of a text-to-image flow on devices of their own, for models larger than a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mfm_lightning.utils.devices import find_device

MAPS = ("auto", "balanced", "balanced_low_0", "sequential")  # by which accelerate spreads a transformer over all GPUs
KEYS = ("transformer", "vae", "text_encoders", "offload_folder")


@dataclass(frozen=True)
class Placement:
    """Where the parts of a flow are. A part without a device moves with the flow, text encoders are on the CPU.

    Args:
        transformer: its device.
        transformer_map: in place of that, accelerate's `device_map`: one of `MAPS`, or devices by the names of modules,
            "cpu" and "disk" among them: those are brought to the GPU when they are computed.
        vae: its device.
        text_encoders: where prompts are encoded.
        offload_folder: for modules on "disk".
    """

    transformer: torch.device | None = None
    transformer_map: str | dict[str, str] | None = None
    vae: torch.device | None = None
    text_encoders: torch.device | None = None
    offload_folder: str | None = None

    @classmethod
    def of(cls, devices: Mapping[str, Any] | None) -> Placement:
        """Of what a config says: `{transformer: cuda:0, vae: cuda:1, text_encoders: cpu}`, or
        `{transformer: balanced}`, or `{transformer: {transformer_blocks: cuda:0, ...}}`.

        Raises:
            ValueError: for an unknown part, or a device that cannot be used here.
        """
        given = dict(devices or {})
        if unknown := [key for key in given if key not in KEYS]:
            raise ValueError(f"devices: no part {unknown[0]!r}: expected some of {', '.join(KEYS)}")
        where, spread = given.get("transformer"), None
        if isinstance(where, Mapping) or where in MAPS:
            spread, where = (dict(where) if isinstance(where, Mapping) else where), None
        for module, device in spread.items() if isinstance(spread, dict) else ():
            if device != "disk":
                _device(f"transformer.{module}", device)
        if isinstance(spread, dict) and "disk" in spread.values() and given.get("offload_folder") is None:
            raise ValueError("devices: modules of the transformer on disk need an offload_folder")
        places = {"transformer": where, "vae": given.get("vae"), "text_encoders": given.get("text_encoders")}
        found = {part: None if name is None else _device(part, name) for part, name in places.items()}
        return cls(**found, transformer_map=spread, offload_folder=given.get("offload_folder"))

    @property
    def names_gpus(self) -> bool:
        """Whether a part is on a GPU of its own, which a second process of this machine would take, too."""
        mapped = self.transformer_map.values() if isinstance(self.transformer_map, dict) else [self.transformer_map]
        devices = [self.transformer, self.vae, self.text_encoders]
        return any(str(name).startswith("cuda") or name in MAPS for name in (*mapped, *devices))

    def loading(self) -> dict[str, Any]:
        """Arguments of diffusers' `from_pretrained` of the transformer."""
        if self.transformer_map is None:
            return {}
        offload = {} if self.offload_folder is None else {"offload_folder": self.offload_folder}
        return {"device_map": self.transformer_map, **offload}


def _device(part: str, name: Any) -> torch.device:
    try:
        return find_device(str(name))
    except ValueError as error:
        raise ValueError(f"devices, {part}: {error}") from error
