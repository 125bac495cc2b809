"""Pre-training methods: `create(name, ...)`, `available()`; docs/METHODS.md says how to write one."""

from methods.base import At, Inputs, Loss, Method, Plan, available, create, from_settings, register
from methods.mae import MAE

__all__ = ["MAE", "At", "Inputs", "Loss", "Method", "Plan", "available", "create", "from_settings", "register"]
