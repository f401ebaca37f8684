"""The table and the picture that ``train_digits.py`` ends with."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# (b) is drawn over (a), which it should hide; dashed and thinner, so that both can be seen.
_STYLES: list[dict[str, Any]] = [
    {"color": "#9ecae1", "linewidth": 6},
    {"color": "#08519c", "linewidth": 2, "linestyle": (0, (4, 3))},
    {"color": "#d95f02", "linewidth": 2},
]


@dataclass
class Course:
    """The course of a training: after each epoch its mean loss and the test accuracy, from 0 to 1.

    `stopped` says that a signal ended it before its time.
    """

    title: str
    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    seconds: float = 0.0
    stopped: bool = False


def table(courses: list[Course]) -> str:
    """One line each: the mean loss of the last epoch, and the test accuracy after it."""
    lines = [f"{'':30}{'loss':>9}{'test accuracy':>16}{'seconds':>10}"]
    lines += [
        f"{c.title:30}{c.losses[-1]:9.4f}{c.accuracies[-1]:15.1%}{c.seconds:11.1f}" for c in courses
    ]
    return "\n".join(lines)


def plot(courses: list[Course], path: Path) -> None:
    """Draws loss and test accuracy over the epochs into an image file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for course in courses:
        style = _STYLES["abc".index(course.title[1])]
        epochs = range(1, len(course.losses) + 1)
        left.plot(epochs, course.losses, label=course.title, **style)
        right.plot(epochs, [100 * share for share in course.accuracies], **style)
    left.set(title="Training loss", xlabel="epoch", yscale="log")
    right.set(title="Test accuracy, %", xlabel="epoch")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.get_major_locator().set_params(integer=True)
    left.legend(frameon=False, handlelength=3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
