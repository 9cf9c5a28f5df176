"""Every task by name. A file of this folder gives its tasks as TASKS."""

from . import many_shot, needles, questions, reasoning, shared_context, tracking, words
from .base import Example, Materials, Setting, Task, Turn, fit

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        *needles.TASKS,
        *tracking.TASKS,
        *words.TASKS,
        *questions.TASKS,
        *shared_context.TASKS,
        *many_shot.TASKS,
        *reasoning.TASKS,
    )
}

__all__ = ["TASKS", "Example", "Materials", "Setting", "Task", "Turn", "fit"]
