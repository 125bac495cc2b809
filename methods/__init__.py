"""Pre-training methods: `create(name, ...)`, `available()`; docs/METHODS.md says how to write one."""

from methods.base import At, Inputs, Loss, Method, Plan, available, create, from_settings, register
from methods.bootmae import BootMAE
from methods.cmae import CMAE
from methods.hpm import HPM
from methods.ibot import IBOT
from methods.mae import MAE
from methods.simmim import SimMIM
from methods.teacher import follow, teacher_of

__all__ = [
    "CMAE",
    "HPM",
    "IBOT",
    "MAE",
    "At",
    "BootMAE",
    "Inputs",
    "Loss",
    "Method",
    "Plan",
    "SimMIM",
    "available",
    "create",
    "follow",
    "from_settings",
    "register",
    "teacher_of",
]
