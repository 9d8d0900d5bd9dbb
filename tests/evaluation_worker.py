"""One process of several: evaluates a model through its trainer, and writes the report and its passes, by rank."""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from models import padded_data, tiny
from test_faults import flags

from fgm_trainer import FGM, PGD, AdversarialTrainer, Noise

if __name__ == "__main__":
    out, examples = Path(sys.argv[1]), int(sys.argv[2])
    model = tiny("bert")
    trainer = AdversarialTrainer(model=model, args=flags(out / "run", per_device_eval_batch_size=4))
    seen = []
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(len(kwargs["labels"])), with_kwargs=True)
    data = padded_data(model, size=examples)
    reports = [
        trainer.evaluate_robustness(data, attacks=attacks, epsilons=[0.3, 1.0]).to_dict()
        for attacks in ([Noise(), FGM(), PGD(steps=3)], "strong")
    ]
    rank = os.environ.get("RANK", "0")
    (out / f"{rank}.json").write_text(json.dumps({"reports": reports, "passes": len(seen)}))
