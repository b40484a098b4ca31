"""How good a model is: loss and bits per byte, and the share of questions it answers exactly."""

from slmkit.evaluation.loss import LossReport, validation_loss
from slmkit.evaluation.questions import QuestionReport, ask

__all__ = ["LossReport", "QuestionReport", "ask", "validation_loss"]
