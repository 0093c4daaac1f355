"""Write tiny NequIP files with the vendor's own code: python tiny_nequip.py FOLDER.

A program of its own, since the vendor sets its global state for good.

tiny       checkpoint and package: l_max 1, pseudovectors, three layers, shift by type
trainable  package: the same with scales and shifts that are parameters
single     checkpoint and package in float64: one shift for all types, no scales
"""

from __future__ import annotations

import os
import sys

import ase.build
import ase.io
import lightning
import torch
from nequip.scripts import package
from nequip.train import EMALightningModule
from nequip.utils import get_current_code_versions
from nequip.utils.global_state import set_global_state

TYPES = ["H", "C", "O", "Cu"]
R_MAX = 4.0

TRANSFORMS = [
    {
        "_target_": "nequip.data.transforms.ChemicalSpeciesToAtomTypeMapper",
        "model_type_names": TYPES,
    },
    {"_target_": "nequip.data.transforms.NeighborListTransform", "r_max": R_MAX},
]
DATA = {
    "_target_": "nequip.data.datamodule.ASEDataModule",
    "seed": 0,
    "train_file_path": "frame.xyz",
    "val_file_path": "frame.xyz",
    "transforms": TRANSFORMS,
}
MODEL = {
    "_target_": "nequip.model.NequIPGNNModel",
    "seed": 0,
    "model_dtype": "float32",
    "r_max": R_MAX,
    "type_names": TYPES,
    "num_layers": 3,
    "l_max": 1,
    "num_features": [8, 4],
    "radial_mlp_width": 16,
    "avg_num_neighbors": 10.0,
    "per_type_energy_scales": {"H": 1.0, "C": 1.5, "O": 2.0, "Cu": 0.5},
    "per_type_energy_shifts": {"H": -1.1, "C": -2.2, "O": -3.3, "Cu": -4.4},
}
SINGLE = {
    **MODEL,
    "model_dtype": "float64",
    "num_layers": 1,
    "readout_mlp_hidden_layers_depth": 1,
    "per_type_energy_scales": None,
    "per_type_energy_shifts": -2.5,
}


def write(name: str, model: dict) -> None:
    """Write NAME.ckpt as a training would leave it, and NAME.nequip.zip."""
    target = "nequip.train.EMALightningModule"
    module = EMALightningModule(
        model=model,
        num_datasets={"train": 1, "val": 1, "test": 0, "predict": 0},
        info_dict={
            "versions": get_current_code_versions(),
            "data": DATA,
            "training_module": {"_target_": target},
        },
    )
    with torch.no_grad():  # the last weights of a training differ from their average
        for parameter in module.model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    trainer = lightning.Trainer(accelerator="cpu", logger=False, barebones=True)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(f"{name}.ckpt")
    package.main(["build", f"{name}.ckpt", f"{name}.nequip.zip"])


if __name__ == "__main__":
    os.chdir(sys.argv[1])
    ase.io.write("frame.xyz", ase.build.bulk("Cu", cubic=True))
    set_global_state()
    write("tiny", MODEL)
    write("single", SINGLE)
    command = "modify tiny.nequip.zip trainable.nequip.zip --modifier"
    modifier = "modify_PerTypeScaleShift scales_trainable=true shifts_trainable=true"
    package.main(f"{command} {modifier}".split())
