"""The verbs: load, finetune, evaluate, merge, calculator; the command line calls them."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from pathtune import delta as deltas
from pathtune import discovery, files, metrics, structures, trust
from pathtune.backends.base import DTYPES, Backend, require_elements
from pathtune.config import RunConfig, read_yaml, validate
from pathtune.deltafile import DeltaFile, fingerprint
from pathtune.errors import PathtuneError, UsageError, unknown
from pathtune.prediction import predict
from pathtune.properties import Prediction, Property, Structure
from pathtune.structures.reference_energies import ReferenceEnergies
from pathtune.training import checkpoint, memory, optimizer
from pathtune.training.data import Frames, batch_indices
from pathtune.training.loop import Outcome, train, training_step

if TYPE_CHECKING:
    from ase.calculators.calculator import Calculator

DELTA = "delta.safetensors"
CONFIG = "config.yaml"
METRICS = "metrics.json"
DEFAULT_STEPS = 2000
EVALUATIONS = 20
