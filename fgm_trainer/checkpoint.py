"""What a Trainer's run keeps between optimizer steps, and its file beside a checkpoint's others."""

from __future__ import annotations

import os
from typing import Any

import torch

from .engine.accelerate import AllProcesses
from .engine.driver import Driver
from .engine.guessing import GuessingLoss, guessing_of
from .engine.kept import Kept
from .loss_reduction import is_the_models_own
from .plan import Plan

# Beside the Trainer's own files of a checkpoint.
STATE_FILE = "adversarial_state.pt"


class RunState:
    """What the attack remembers, what steers epsilon, and what an epsilon is multiplied by.

    Args:
        trainer: the Trainer.
        plan: how it is attacked.

    Attributes:
        kept: the memories; None before the first step.
        unit: what an epsilon is multiplied by; None before it is known.
    """

    def __init__(self, trainer: Any, plan: Plan) -> None:
        self._trainer, self._plan = trainer, plan
        self.unit: float | None = None
        self.forget()

    def forget(self) -> None:
        """A run starts anew."""
        self.kept: Kept | None = None
        self._saved: dict[str, Any] = {}

    def of(self, driver: Driver) -> Kept:
        """The memories, for the driver's model; where training goes on as they were saved."""
        if self.kept is None:
            self.kept = Kept(
                driver.attack,
                driver.target,
                self._trainer.args.seed,
                strength=self._plan.strength,
                recover=self._plan.recover,
                guessing=self._guessing(driver),
            )
            self.kept.load_state_dict(self._saved)
        return self.kept

    def _guessing(self, driver: Driver) -> GuessingLoss:
        """What guessing would cost is known of the model's own loss alone."""
        return guessing_of(driver.engine.model) if is_the_models_own(self._trainer) else GuessingLoss()

    def settle(self, driver: Driver | None) -> None:
        """Between two optimizer steps: what all processes have found."""
        if self.kept is not None and driver is not None:
            self.kept.settle(driver.engine.model, AllProcesses(self._trainer.accelerator))

    def save(self, folder: str, driver: Driver | None) -> None:
        """Writes the file beside a checkpoint's, where there is something to keep; on every process."""
        self.settle(driver)
        states, unit = {} if self.kept is None else self.kept.state_dict(), self.unit or 1.0
        if self._trainer.args.should_save and (states or unit != 1):
            torch.save({"epsilon_unit": unit, **states}, os.path.join(folder, STATE_FILE))

    def load(self, folder: str | None) -> None:
        """Reads it, if there is one."""
        path = None if folder is None else os.path.join(folder, STATE_FILE)
        if path is not None and os.path.exists(path):
            # A memory may be larger than a device; what is needed there is moved where it is used.
            self._saved = torch.load(path, map_location="cpu", weights_only=True)
            self.unit = self._saved.pop("epsilon_unit")
