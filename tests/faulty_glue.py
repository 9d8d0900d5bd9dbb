"""run_glue.py with a fault: `faulty_glue.py KIND RANK STEP FLAGS`, the examples on the path.

In the second forward pass of training step STEP, behind the model's lookup, the process of that rank raises an
exception or kills itself.
"""

import os
import signal
import sys

import run_glue

KIND, RANK, STEP = sys.argv[1], *map(int, sys.argv[2:4])


class Faulty(run_glue.AdversarialTrainer):
    passes = step = 0

    def training_step(self, *args, **kwargs):
        if not Faulty.step:
            # On the one module: a hook on all of them may change what the lookup gives, and rounding with it.
            (embeddings,) = (m for m in self.model.modules() if type(m).__name__ == "BertEmbeddings")
            embeddings.register_forward_hook(fault)
        Faulty.passes, Faulty.step = 0, self.state.global_step + 1
        return super().training_step(*args, **kwargs)


def fault(module, args, output):
    if not module.training:
        return
    Faulty.passes += 1
    if (Faulty.step, Faulty.passes, int(os.environ.get("RANK", 0))) == (STEP, 2, RANK):
        if KIND == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError(f"injected into step {STEP}")


run_glue.AdversarialTrainer = Faulty
run_glue.main(sys.argv[4:])
