"""A framework of its own: an autograd tape whose batch norm is two calls of ``cupybn.functional``.

``python examples/custom_framework.py`` compares its gradients with central differences.
"""

import numpy as np

from cupybn import functional


class Tape:
    """Remembers how to go back from each result to what it was computed from."""

    def __init__(self):
        self.steps = []

    def record(self, value, inputs, gradients_of):
        """A result; ``gradients_of(its gradient)`` gives one gradient for each of the inputs."""
        result = Variable(value)
        self.steps.append((result, inputs, gradients_of))
        return result

    def backward(self, loss):
        loss.grad = np.ones_like(loss.value)
        for result, inputs, gradients_of in reversed(self.steps):
            for variable, grad in zip(inputs, gradients_of(result.grad), strict=True):
                variable.grad += grad


class Variable:
    def __init__(self, value):
        self.value = np.asarray(value)
        self.grad = np.zeros_like(self.value)


def matmul(tape, a, b):
    return tape.record(a.value @ b.value, (a, b), lambda d: (d @ b.value.T, a.value.T @ d))


def batch_norm(tape, x, weight, bias):
    y, saved = functional.batch_norm_forward(x.value, weight.value, bias.value)  # comm=... for MPI

    def gradients_of(dy):
        grads = functional.batch_norm_backward(dy, saved)
        return grads.dx, grads.dweight, grads.dbias

    return tape.record(y, (x, weight, bias), gradients_of)


def sum_of_sines(tape, x):
    return tape.record(np.sin(x.value).sum(), (x,), lambda d: (d * np.cos(x.value),))


def network(tape, x, matrix, weight, bias):
    return sum_of_sines(tape, batch_norm(tape, matmul(tape, x, matrix), weight, bias))


def largest_error(variables, step=1e-6):
    """The largest difference between the tape's gradients and central differences."""
    tape = Tape()
    tape.backward(network(tape, *variables))
    errors = []
    for variable in variables:
        for index in np.ndindex(variable.value.shape):
            before = variable.value[index]
            losses = []
            for moved in (before + step, before - step):
                variable.value[index] = moved
                losses.append(network(Tape(), *variables).value)
            variable.value[index] = before
            errors.append(abs(variable.grad[index] - (losses[0] - losses[1]) / (2 * step)))
    return max(errors)


if __name__ == "__main__":
    rng = np.random.default_rng(0)
    shapes = {"x": (6, 3), "matrix": (3, 4), "weight": (4,), "bias": (4,)}
    variables = [Variable(rng.standard_normal(shape)) for shape in shapes.values()]
    print(f"gradients of {', '.join(shapes)}: largest error {largest_error(variables):.1e}")
