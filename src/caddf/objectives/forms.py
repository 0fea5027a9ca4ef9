"""The denoising losses by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from caddf.errors import Checked
from caddf.objectives.any_order import AnyOrderLoss
from caddf.objectives.dce import Denoising, LambdaDCE, TimeDCE
from caddf.objectives.loss import Times
from caddf.schedules import SCHEDULES, ScheduleName

Form = Literal["lambda-dce", "t-dce", "ao"]


def denoising(form: Form, schedule: ScheduleName, times: Times) -> Denoising:
    """The loss of that name; `schedule` is t-DCE's."""
    forms: dict[str, Denoising] = {
        "lambda-dce": LambdaDCE(times),
        "t-dce": TimeDCE(SCHEDULES[schedule](), times),
        "ao": AnyOrderLoss(times),
    }
    return forms[form]


@dataclass(frozen=True)
class DenoisingConfig(Checked):
    """A masked denoiser's loss.

    form: lambda-DCE (eq. 9), t-DCE (eq. 8) or the any-order form; they agree in expectation.
    schedule: of t-DCE.
    times: how the noise levels of a batch are drawn.
    """

    form: Form = "lambda-dce"
    schedule: ScheduleName = "loglinear"
    times: Times = "stratified"

    def build(self) -> Denoising:
        """The loss."""
        return denoising(self.form, self.schedule, self.times)
