"""A layer whose state has changed, and loads what older versions saved."""

import numpy as np

import cupybn


class GainBatchNorm(cupybn.BatchNorm2d):
    """Batch norm with a trained gain; the state of version 3 had its logarithm."""

    version = 4

    def __init__(self, num_features, **options):
        super().__init__(num_features, **options)
        self.register_parameter("gain", np.ones(1, np.float32))

    def upgrade_state_dict(self, state, prefix, version):
        super().upgrade_state_dict(state, prefix, version)  # from batch norm's version 1
        if version < 3:
            state[f"{prefix}gain"] = np.ones(1, np.float32)
        elif version == 3:
            state[f"{prefix}gain"] = np.exp(state.pop(f"{prefix}log_gain"))


old = cupybn.BatchNorm2d(8).state_dict()
old["log_gain"] = np.log(np.float32([2]))
old.metadata[""]["version"] = 3
new = GainBatchNorm(8)
new.load_state_dict(old)
assert new.gain == 2
assert "log_gain" in old  # upgrades work on a copy
